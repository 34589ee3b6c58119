"""The main figure draws the multipliers of fits.json, and beside them the paper's."""

import math

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.container import ErrorbarContainer

from peerscale.figures.multipliers import multipliers_figure, paper_multipliers
from peerscale.figures.published import read_published
from toy_study import fits_with_curves

PEER = [
    {"method": "peer", "reference": "dense", "budget": 1e12, "multiplier": 1.1, "low": 1.0, "high": 1.2,
     "by_seed": {"0": 1.05, "1": 1.15}},
    {"method": "peer", "reference": "dense", "budget": 3e12, "multiplier": 1.3, "low": 1.2, "high": 1.5},
]  # fmt: skip


def lines(axes: Axes) -> dict[str, np.ndarray]:
    """The points of each method with a line or bars, by label."""
    found = (container for container in axes.containers if isinstance(container, ErrorbarContainer))
    return {str(container.get_label()): np.asarray(container.lines[0].get_xydata(), float) for container in found}


def dots(axes: Axes) -> list[float]:
    scattered = (drawn for drawn in axes.collections if isinstance(drawn, PathCollection))
    return sorted(float(y) for scatter in scattered for y in np.asarray(scatter.get_offsets())[:, 1])


def test_multipliers_bands_and_seeds() -> None:
    figure = multipliers_figure(fits_with_curves({"budgets": [], "multipliers": PEER}), read_published())
    assert figure is not None
    ours, paper = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["PEER", "the paper"]
    np.testing.assert_allclose(lines(ours)["peer"], [(1e12, 1.1), (3e12, 1.3)])
    band = ours.collections[0].get_paths()[0].vertices[:, 1]
    assert {*np.round(band, 6)} == {1.0, 1.2, 1.5}
    assert dots(ours) == [1.05, 1.15] and [*lines(paper)] == ["peer"]
    figure.draw_without_rendering()


def test_each_method_has_a_panel_with_its_variants() -> None:
    others = [{**one, "method": name} for one in PEER for name in ("pkm", "peer n_experts=16384")]
    figure = multipliers_figure(fits_with_curves({"budgets": [], "multipliers": [*PEER, *others]}), read_published())
    assert figure is not None and [axes.get_title() for axes in figure.axes] == ["PKM", "PEER", "the paper"]
    assert [[name for name in lines(axes) if "apart" not in name] for axes in figure.axes] == [
        ["pkm"], ["peer", "peer n_experts=16384"], ["pkm", "peer"]
    ]  # fmt: skip


def test_budgets_below_the_trend_stand_apart_from_the_line() -> None:
    third = {**PEER[1], "budget": 1e13, "multiplier": 1.4}
    fits = {"budgets": [], "multipliers": [*PEER, third], "trend_from": 3e12}
    figure = multipliers_figure(fits_with_curves(fits), read_published())
    assert figure is not None
    drawn = lines(figure.axes[0])
    np.testing.assert_allclose(drawn["peer"][:, 1], [1.3, 1.4])
    np.testing.assert_allclose(drawn["peer apart"], [(1e12, 1.1)])
    (apart,) = (one for one in figure.axes[0].containers if one.get_label() == "peer apart")
    np.testing.assert_allclose(apart.lines[2][0].get_segments()[0][:, 1], [1.0, 1.2])


def test_a_multiplier_from_a_flagged_minimum_is_hollow() -> None:
    methods = [{"name": "peer", "status": "off_centre"}, {"name": "dense", "status": "ok"}]
    fits = {"budgets": [{"budget": 3e12, "methods": methods}], "multipliers": PEER}
    figure = multipliers_figure(fits_with_curves(fits), read_published())
    assert figure is not None
    hollow = [np.asarray(line.get_ydata(), float).tolist() for line in figure.axes[0].lines
              if line.get_markerfacecolor() == "white" and len(line.get_ydata())]  # fmt: skip
    assert hollow == [[1.3]]


def test_one_budget_makes_no_figure() -> None:
    assert multipliers_figure(fits_with_curves({"budgets": [], "multipliers": PEER[:1]}), read_published()) is None


def test_the_papers_multipliers_by_hand() -> None:
    """Table 1, C4: dense 23.84 and 18.31, PEER 20.63 and 16.45 at 6e18 and 2e19; lines in log C, log L."""
    found = paper_multipliers(read_published(), ["peer", "moe_token_choice"])
    assert found.keys() == {"peer"}

    def between(loss: float, losses: tuple[float, float]) -> float:
        part = (math.log(losses[0]) - math.log(loss)) / (math.log(losses[0]) - math.log(losses[1]))
        return 6e18 * (2e19 / 6e18) ** part

    dense, peer = ((math.log(a), math.log(b)) for a, b in ((23.84, 18.31), (20.63, 16.45)))
    assert found["peer"][6e18] == pytest.approx(between(peer[0], dense) / 6e18)
    assert found["peer"][2e19] == pytest.approx(2e19 / between(dense[1], peer))
