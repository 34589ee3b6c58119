"""The figure of differences draws the differences of fits.json."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from peerscale.figures.differences import differences_figure
from peerscale.figures.style import colours
from toy_study import curve_of, fits_with_curves


def fits(*rows: tuple[float, str, str, float | None, float, float]) -> dict[str, Any]:
    """Of (budget, method, reference, value, low, high)."""
    budgets = dict.fromkeys(row[0] for row in rows)
    return {
        "budgets": [
            {"budget": budget, "methods": [], "differences": [
                {"method": method, "reference": of, "size": ""}
                | ({} if v is None else {"value": v, "low": low, "high": high})
                for at, method, of, v, low, high in rows if at == budget
            ]}
            for budget in budgets
        ]
    }  # fmt: skip


ROWS = fits(
    (1e11, "peer", "dense", -0.11, -0.12, -0.10),
    (3e11, "peer", "dense", 0.004, 0.001, 0.007),
    (1e11, "pkm", "dense", -0.07, -0.09, -0.05),
    (3e11, "pkm", "dense", None, 0, 0),
    (1e11, "dense", "peer", 0.11, 0.10, 0.12),
)


def drawn(figure: Figure | None) -> Figure:
    assert figure is not None
    return figure


def test_points_and_intervals() -> None:
    axes = drawn(differences_figure(fits_with_curves(ROWS))).axes[0]
    points = {
        (str(line.get_label()), *np.asarray(line.get_xdata(), float))
        for line in axes.lines
        if not str(line.get_label()).startswith("_")
    }
    assert points == {("peer", -0.11), ("peer", 0.004), ("pkm", -0.07)}
    intervals = [tuple(line.get_xdata()) for line in axes.lines if line.get_label() == "_interval peer"]
    assert intervals == [(-0.12, -0.10), (0.001, 0.007)]


def test_a_row_a_method_and_a_marker_a_budget() -> None:
    axes = drawn(differences_figure(fits_with_curves(ROWS))).axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["PKM", "PEER"]
    peer = [line for line in axes.lines if line.get_label() == "peer"]
    assert len({line.get_marker() for line in peer}) == 2
    assert {round(float(np.asarray(line.get_ydata())[0])) for line in peer} == {1}


def test_without_a_difference_there_is_no_figure() -> None:
    nothing = fits((1e11, "pkm", "dense", None, 0, 0), (1e11, "dense", "peer", 0.1, 0, 0.2))
    assert differences_figure(fits_with_curves(nothing)) is None
    assert differences_figure(fits_with_curves({"budgets": []})) is None


def test_variants_have_the_colours_of_the_studys_other_figures() -> None:
    variants = [f"{method} batch_sequences={n}" for method in ("dense", "peer") for n in (8, 16, 32, 64)]
    rows = fits(*((1e11, name, f"dense {name.split(' ')[1]}", -0.1, -0.2, 0.0) for name in variants[5:]))
    curves = [*map(curve_of, variants)]
    lines = drawn(differences_figure(fits_with_curves(rows), curves)).axes[0].lines
    found = {line.get_label(): line.get_color() for line in lines if line.get_label() in variants}
    assert found == {str(curve): colours(curves)[curve] for curve in curves[5:]}
    assert found != {str(curve): colour for curve, colour in colours(curves[5:]).items()}


def test_no_two_intervals_of_a_row_lie_on_each_other() -> None:
    """Not even those of two sizes at one budget, beside methods that are at their optimum."""
    rows = fits(
        (1e11, "peer", "dense", -0.1, -0.2, 0), (1e11, "moe", "dense", 0, -1, 1), (1e11, "moe", "dense", 1, 0, 2)
    )
    for found, size in zip(rows["budgets"][0]["differences"][1:], ("d32", "d64"), strict=True):
        found["size"] = size
    axes = drawn(differences_figure(fits_with_curves(rows))).axes[0]
    heights = [float(np.asarray(line.get_ydata())[0]) for line in axes.lines if line.get_label() == "_interval moe"]
    assert len({*heights}) == 2 and {round(height) for height in heights} == {0}


def test_with_several_references_the_axis_says_so_and_none_is_a_row() -> None:
    batch = "batch_sequences=32"
    axes = drawn(differences_figure(fits_with_curves(fits(
        (1e13, f"dense {batch}", "dense", 0.02, 0.01, 0.03),
        (1e13, "peer", "dense", -0.05, -0.07, -0.03),
        (1e13, f"peer {batch}", f"dense {batch}", -0.05, -0.07, -0.03),
    )))).axes[0]  # fmt: skip
    assert [text.get_text() for text in axes.get_yticklabels()] == ["PEER", "PEER, batch 32"]
    assert "minus dense's with the same settings" in axes.get_xlabel()


def test_of_one_size_the_axis_names_it_and_beside_curves_its_points_are_hollow() -> None:
    for entry in (alone := fits((1e13, "peer n_heads=1", "dense", -0.05, -0.07, -0.03)))["budgets"]:
        entry["differences"][0]["size"] = "d64"
    axes = drawn(differences_figure(fits_with_curves(alone))).axes[0]
    assert axes.get_title() == "$10^{13}$ FLOPs, d_model 64" and axes.get_xlabel().startswith("loss minus dense's")
    assert not [line for line in axes.lines if line.get_markerfacecolor() == "white" and line.get_marker() != "None"]
    mixed = fits((1e13, "peer", "dense", -0.05, -0.07, -0.03), (1e13, "moe", "dense", -0.01, -0.03, 0.01))
    mixed["budgets"][0]["methods"] = [{"name": "peer", "status": "ok"}]
    mixed["budgets"][0]["differences"][1]["size"] = "d64"
    figure = drawn(differences_figure(fits_with_curves(mixed)))
    axes = figure.axes[0]
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == "white" and line.get_marker() != "None"]
    assert [line.get_label() for line in hollow] == ["moe"]
    assert axes.get_title() == "$10^{13}$ FLOPs, at the compute optimum"


def test_a_difference_from_a_flagged_minimum_is_hollow() -> None:
    two = fits((1e13, "peer", "dense", -0.05, -0.07, -0.03), (3e13, "peer", "dense", -0.02, -0.04, 0.00))
    two["budgets"][1]["methods"] = [{"name": "peer", "status": "ok"}, {"name": "dense", "status": "off_centre"}]
    figure = drawn(differences_figure(fits_with_curves(two)))
    points = [line for line in figure.axes[0].lines if line.get_label() == "peer"]
    assert [line.get_markerfacecolor() == "white" for line in points] == [False, True]


def test_of_two_sizes_each_has_its_marker_and_its_place_in_the_row() -> None:
    two = fits((1e13, "peer", "dense", -0.05, -0.07, -0.03), (1e13, "peer", "dense", -0.02, -0.04, 0.00))
    for entry, size in zip(two["budgets"][0]["differences"], ("d32-h4", "d48-h6"), strict=True):
        entry["size"] = size
    figure = drawn(differences_figure(fits_with_curves(two)))
    points = [line for line in figure.axes[0].lines if line.get_label() == "peer"]
    assert len({line.get_marker() for line in points}) == 2
    assert len({float(np.asarray(line.get_ydata())[0]) for line in points}) == 2
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert said == ["d_model 32 (4 heads)", "d_model 48 (6 heads)"]
