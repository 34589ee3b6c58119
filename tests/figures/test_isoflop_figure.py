"""The isoFLOP figure draws the table's numbers, and nothing else."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from synthetic_study import GRID, METHODS, SWEEP, minimum, shared_curvature

from peerscale.figures.isoflop import isoflop_figure
from peerscale.records.study import collected
from peerscale.stats.curve import Curve, at_size
from peerscale.stats.fits import read_fits

Fits = dict[str, Any]
NOTHING: Fits = {"budgets": [], "baseline": "dense"}


@pytest.fixture(scope="module")
def study(collected_runs: Path) -> tuple[pd.DataFrame, Fits]:
    files = collected(SWEEP, collected_runs)
    return pd.read_csv(files.runs), read_fits(files.fits)


def points(axes: Axes, name: str) -> np.ndarray:
    """(n, 2) drawn points of a method."""
    found = [c for c in axes.containers if isinstance(c, ErrorbarContainer) and c.get_label() == name]
    return np.column_stack(found[0].lines[0].get_data()) if found else np.empty((0, 2))


def line(axes: Axes, label: str) -> np.ndarray:
    found = [np.column_stack(line.get_data()) for line in axes.lines if line.get_label() == label]
    return np.concatenate(found) if found else np.empty((0, 2))


def finished(runs: pd.DataFrame, name: str, budget: float) -> pd.DataFrame:
    """The finished runs, by size; from the cells' names, not the code under test."""
    rows = runs[runs["cell"].str.startswith(f"{name}-") & (runs["budget"] == budget) & (runs["status"] == "done")]
    return rows.sort_values("flops_per_token")


@pytest.mark.parametrize("x", ["params_total", "flops_per_token"])
def test_points_curves_and_minima_are_the_tables(study: tuple[pd.DataFrame, Fits], x: str) -> None:
    runs, fits = study
    figure = isoflop_figure(runs, fits, x=x)
    for axes, budget in zip(figure.axes, GRID, strict=True):
        done = {name: finished(runs, name, budget) for name in METHODS}
        curves = shared_curvature({name: (d["flops_per_token"], d["val_loss"]) for name, d in done.items()})
        for name, rows in done.items():
            np.testing.assert_allclose(points(axes, name), np.column_stack([rows[x], np.exp(rows["val_loss"])]))
            curve, flops = line(axes, f"_fit {name}"), np.log10(rows["flops_per_token"])
            assert curve[[0, -1], 0] == pytest.approx([rows[x].min(), rows[x].max()])
            wanted = np.polynomial.Polynomial(curves[name])
            on_curve = np.interp(np.log(rows[x]), np.log(curve[:, 0]), np.log(curve[:, 1]))
            np.testing.assert_allclose(on_curve, wanted(flops), atol=2e-4)  # 200 points, joined by straight lines
            optimal, loss = minimum(curves[name])
            ((at, perplexity),) = line(axes, f"_minimum {name}")
            assert perplexity == pytest.approx(np.exp(loss), rel=1e-6)
            if x == "flops_per_token":
                assert at == pytest.approx(optimal, rel=1e-6)
                continue
            above = int(np.searchsorted(flops, np.log10(optimal)))  # between two models, in proportion of logarithms
            place = (np.log10(optimal) - flops.iloc[above - 1]) / (flops.iloc[above] - flops.iloc[above - 1])
            low, high = rows[x].iloc[above - 1], rows[x].iloc[above]
            assert at == pytest.approx(low ** (1 - place) * high**place, rel=1e-6)


def test_a_size_on_another_axis_is_log_linear_between_the_models() -> None:
    rows = pd.DataFrame({"flops_per_token": [1e5, 1e7, 1e8, 1e8], "params_total": [10.0, 1000.0, 2000.0, 2000.0]})
    found = at_size(rows["params_total"], rows, np.array([1e5, 1e6, 1e7, 10**7.5]))
    assert found == pytest.approx([10, 100, 1000, 1000 * 2**0.5])


def with_dense(fits: Fits, **changes: Any) -> Fits:
    """The fits with dense's entry at the first budget changed."""
    first, *rest = fits["budgets"]
    methods = [{**m, **changes} if m["name"] == Curve("dense") else m for m in first["methods"]]
    return {"budgets": [{**first, "methods": methods}, *rest]}


@pytest.mark.parametrize(("status", "face"), [("ok", "filled"), ("off_centre", "hollow")])
def test_a_flagged_minimum_is_hollow(study: tuple[pd.DataFrame, Fits], status: str, face: str) -> None:
    runs, fits = study
    figure = isoflop_figure(runs, with_dense(fits, status=status), x="params_total")
    (star,) = (line for line in figure.axes[0].lines if line.get_label() == "_minimum dense")
    assert ("hollow" if star.get_markerfacecolor() == "white" else "filled") == face


@pytest.mark.parametrize("status", ["too_few", "outside_range", "curvature"])
def test_no_star_without_a_number(study: tuple[pd.DataFrame, Fits], status: str) -> None:
    runs, fits = study
    axes = isoflop_figure(runs, with_dense(fits, status=status, x=None, loss=None), x="params_total").axes[0]
    assert len(line(axes, "_minimum dense")) == 0
    assert len(line(axes, "_minimum peer")) == 1


def test_points_that_coincide_can_be_told_apart(study: tuple[pd.DataFrame, Fits]) -> None:
    figure = isoflop_figure(*study, x="params_total")
    points = [container.lines[0] for container in figure.axes[0].containers]
    stars = [line for line in figure.axes[0].lines if line.get_marker() == "*"]
    assert stars and max(star.get_zorder() for star in stars) < min(drawn.get_zorder() for drawn in points)
    shapes = {drawn.get_color(): drawn.get_marker() for drawn in points}
    assert len(set(shapes.values())) == len(METHODS)
    assert shapes == {handle.get_color(): handle.get_marker() for handle in figure.legends[0].get_lines()}


def test_labels(study: tuple[pd.DataFrame, Fits]) -> None:
    figure = isoflop_figure(*study, x="params_active")
    assert [axes.get_title() for axes in figure.axes] == ["$10^{11}$ FLOPs", r"$3 \times 10^{11}$ FLOPs"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "dense",
        "MoE (expert choice)",
        "MoE (token choice)",
        "PKM",
        "PEER",
    ]
    assert "perplexity" in figure.axes[0].get_ylabel()
    assert figure.axes[0].get_xlabel() == "parameters, active per token"


def drawn(figure: Figure) -> Figure:
    figure.draw_without_rendering()
    return figure


def test_a_study_with_next_to_nothing_in_it_is_still_drawn(study: tuple[pd.DataFrame, Fits]) -> None:
    runs, _ = study
    one_cell = runs[(runs["cell"] == "dense-d8-1e11-s0") | (runs["status"] != "done")]
    figure = drawn(isoflop_figure(one_cell, NOTHING, x="params_total"))
    assert [len(points(axes, "dense")) for axes in figure.axes] == [1]
    assert len(line(figure.axes[0], "_hollow dense")) == 1 and figure.get_supxlabel() == "hollow points: in no fit"
    for x in ("params_total", "flops_per_token"):
        axes = drawn(isoflop_figure(one_cell.assign(val_loss_se=np.nan), NOTHING, x=x)).axes[0]
        ((size, perplexity),) = points(axes, "dense")
        assert axes.get_xlim()[0] < size < axes.get_xlim()[1]
        assert axes.get_ylim()[0] < perplexity < axes.get_ylim()[1]


def test_a_budget_without_a_finished_cell_has_no_panel(study: tuple[pd.DataFrame, Fits]) -> None:
    runs, fits = study
    last = runs["budget"] == max(GRID)
    begun = runs.assign(status=runs["status"].mask(last, "pending"), val_loss=runs["val_loss"].mask(last))
    figure = isoflop_figure(begun, fits, x="params_total")
    assert len(figure.axes) == len(GRID) - 1
