"""The isoFLOP figure draws the table's numbers, and nothing else."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from synthetic_study import GRID, SWEEP, WRONG
from synthetic_surface import BUDGETS, surface_curves, surface_runs

from peerscale.runs.fits import fit_study
from peerscale.runs.study import collected, read_json
from peerscale.viz.isoflop import isoflop_figure, missing_note

Fits = dict[str, Any]


@pytest.fixture(scope="module")
def study(collected_runs: Path) -> tuple[pd.DataFrame, Fits]:
    files = collected(SWEEP, collected_runs)
    return pd.read_csv(files.runs), read_json(files.fits)


def points(axes: Axes, name: str) -> np.ndarray:
    """(n, 2) drawn points of a method."""
    found = [c for c in axes.containers if isinstance(c, ErrorbarContainer) and c.get_label() == name]
    return np.column_stack(found[0].lines[0].get_data()) if found else np.empty((0, 2))


def line(axes: Axes, label: str) -> np.ndarray:
    found = [line for line in axes.lines if line.get_label() == label]
    return np.column_stack(found[0].get_data()) if found else np.empty((0, 2))


def expected(runs: pd.DataFrame, name: str, budget: float, x: str) -> np.ndarray:
    """(n, 2) size and loss of the finished runs, by size; from the cells' names, not the code under test."""
    rows = runs[runs["cell"].str.startswith(f"{name}-") & (runs["budget"] == budget) & (runs["status"] == "done")]
    return rows.sort_values(x)[[x, "val_loss"]].to_numpy(float)


@pytest.mark.parametrize("x", ["params_total", "flops_per_token"])
def test_points_curves_and_minima_are_the_tables(study: tuple[pd.DataFrame, Fits], x: str) -> None:
    runs, fits = study
    figure = isoflop_figure(runs, fits, x=x)
    for axes, budget in zip(figure.axes, GRID, strict=True):
        for name in ("dense", "moe", "moe_token_choice", "pkm", "peer"):
            size, loss = expected(runs, name, budget, x).T
            np.testing.assert_allclose(points(axes, name), np.column_stack([size, np.exp(loss)]))
            polynomial = np.polynomial.Polynomial.fit(np.log10(size), loss, 2)
            curve = line(axes, f"_fit {name}")
            assert curve[[0, -1], 0] == pytest.approx([size.min(), size.max()])
            np.testing.assert_allclose(np.log(curve[:, 1]), polynomial(np.log10(curve[:, 0])), atol=1e-9)
            (minimum,) = polynomial.deriv().roots()
            star = line(axes, f"_minimum {name}")
            np.testing.assert_allclose(star, [[10**minimum, np.exp(polynomial(minimum))]], rtol=1e-6)


def test_flagged_minima_are_hollow(study: tuple[pd.DataFrame, Fits]) -> None:
    figure = isoflop_figure(*study, x="params_total")
    hollow = {
        (budget, line.get_label().removeprefix("_minimum "))
        for axes, budget in zip(figure.axes, GRID, strict=True)
        for line in axes.lines
        if line.get_label().startswith("_minimum") and line.get_markerfacecolor() == "white"
    }
    # Four sizes are left where a cell went wrong.
    assert hollow == {(1e11, "pkm"), (3e11, "moe"), (3e11, "peer")}


def test_sizes_that_a_parabola_leaves_out_are_hollow_and_beyond_its_ends() -> None:
    runs = surface_runs()
    fits = fit_study(runs, surface_curves(runs))
    figure = isoflop_figure(runs, fits, x="flops_per_token")
    for axes, budget in zip(figure.axes, BUDGETS, strict=True):
        sizes, _ = expected(runs, "dense", budget, "flops_per_token").T
        drawn = points(axes, "dense")[:, 0]
        hollow = points(axes, "_left out dense")[:, 0]
        assert len(hollow) and sorted([*drawn, *hollow]) == pytest.approx(sizes)
        (container,) = [c for c in axes.containers if c.get_label() == "_left out dense"]
        assert container.lines[0].get_markerfacecolor() == "white"
        assert line(axes, "_fit dense")[[0, -1], 0] == pytest.approx([drawn.min(), drawn.max()])
        assert all(size < drawn.min() or size > drawn.max() for size in hollow)
    assert "hollow points" in figure.get_supxlabel()


def test_error_bars_are_one_standard_error(study: tuple[pd.DataFrame, Fits]) -> None:
    runs, fits = study
    axes = isoflop_figure(runs, fits, x="params_total").axes[0]
    container = next(c for c in axes.containers if c.get_label() == "dense")
    (bars,) = container.lines[2]
    rows = runs[(runs["method"] == "dense") & (runs["budget"] == 1e11)].sort_values("params_total")
    for segment, loss, error in zip(bars.get_segments(), rows["val_loss"], rows["val_loss_se"], strict=True):
        np.testing.assert_allclose(np.log(segment[:, 1]), [loss - error, loss + error])


def test_labels(study: tuple[pd.DataFrame, Fits]) -> None:
    figure = isoflop_figure(*study, x="params_active", note="data: gutenberg")
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
    assert "gutenberg" in figure.get_supxlabel()
    assert "1 diverged, 1 dropped, 1 failed" in figure.get_supxlabel()


def test_missing_cells_are_counted(study: tuple[pd.DataFrame, Fits]) -> None:
    runs, _ = study
    assert missing_note(runs[~runs["cell"].isin(WRONG)]) == ""


def drawn(figure: Figure) -> Figure:
    figure.draw_without_rendering()
    return figure


def test_a_study_with_next_to_nothing_in_it_is_still_drawn(study: tuple[pd.DataFrame, Fits]) -> None:
    runs, _ = study
    one_cell = runs[(runs["cell"] == "dense-d8-1e11-s0") | (runs["status"] != "done")]
    figure = drawn(isoflop_figure(one_cell, {}, x="params_total"))
    assert [len(points(axes, "dense")) for axes in figure.axes] == [1]
    for x in ("params_total", "flops_per_token"):
        axes = drawn(isoflop_figure(one_cell.assign(val_loss_se=np.nan), {}, x=x)).axes[0]
        ((size, perplexity),) = points(axes, "dense")
        assert axes.get_xlim()[0] < size < axes.get_xlim()[1]
        assert axes.get_ylim()[0] < perplexity < axes.get_ylim()[1]


def test_a_minimum_far_outside_does_not_squeeze_the_points(study: tuple[pd.DataFrame, Fits]) -> None:
    runs, fits = study
    far = {**fits["dense/params_total"]["vertices"][0], "x": 1e12, "loss": 1.0, "status": "outside_range"}
    changed = {**fits, "dense/params_total": {**fits["dense/params_total"], "vertices": [far]}}
    before, after = (isoflop_figure(runs, f, x="params_total").axes[0] for f in (fits, changed))
    assert after.get_xlim() == before.get_xlim()
    assert after.get_ylim() == before.get_ylim()


def test_no_star_without_a_minimum(study: tuple[pd.DataFrame, Fits]) -> None:
    runs, fits = study
    flat = {
        **fits["dense/params_total"]["vertices"][0],
        "x": None,
        "loss": None,
        "curvature": -1.0,
        "status": "curvature",
    }
    changed = {**fits, "dense/params_total": {**fits["dense/params_total"], "vertices": [flat]}}
    axes = isoflop_figure(runs, changed, x="params_total").axes[0]
    assert len(line(axes, "_minimum dense")) == 0
    assert len(line(axes, "_minimum peer")) == 1


def test_a_budget_without_a_finished_cell_has_no_panel_and_is_told(study: tuple[pd.DataFrame, Fits]) -> None:
    runs, fits = study
    last = runs["budget"] == max(GRID)
    begun = runs.assign(status=runs["status"].mask(last, "pending"), val_loss=runs["val_loss"].mask(last))
    figure = isoflop_figure(begun, fits, x="params_total")
    assert len(figure.axes) == len(GRID) - 1
    assert f"{last.sum()} pending" in figure.get_supxlabel()
