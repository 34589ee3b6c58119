"""The main figure draws the multipliers of fits.json, and beside them the paper's."""

import math

import numpy as np
import pytest
from matplotlib.axes import Axes

from peerscale.figures.multipliers import multipliers_figure, paper_multipliers
from peerscale.figures.published import read_published

PEER = [
    {"method": "peer", "reference": "dense", "budget": 1e12, "multiplier": 1.1, "low": 1.0, "high": 1.2,
     "by_seed": {"0": 1.05, "1": 1.15}},
    {"method": "peer", "reference": "dense", "budget": 3e12, "multiplier": 1.3, "low": 1.2, "high": 1.5},
]  # fmt: skip


def dots(axes: Axes) -> list[float]:
    return sorted(float(y) for scatter in axes.collections[1:] for y in np.asarray(scatter.get_offsets())[:, 1])


def test_multipliers_bands_and_seeds() -> None:
    figure = multipliers_figure({"budgets": [], "multipliers": PEER}, read_published(), note="a note")
    assert figure is not None
    ours, paper = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["PEER", "the paper"]
    np.testing.assert_allclose(ours.lines[1].get_ydata(), [1.1, 1.3])  # the first is that of dense
    band = ours.collections[0].get_paths()[0].vertices[:, 1]
    assert {*np.round(band, 6)} == {1.0, 1.2, 1.5}
    assert dots(ours) == [1.05, 1.15]
    assert paper.lines[1].get_label() == "peer" and "a note" in figure.get_supxlabel()
    assert "from one seed" in figure.get_supxlabel()
    alone = multipliers_figure(
        {"budgets": [], "multipliers": [*PEER[1:], {**PEER[0], "by_seed": None}]}, read_published()
    )
    assert alone is not None and "from one seed" not in alone.get_supxlabel()
    figure.draw_without_rendering()


def test_each_method_has_a_panel_with_its_variants() -> None:
    others = [{**one, "method": name} for one in PEER for name in ("pkm", "peer n_experts=16384")]
    figure = multipliers_figure({"budgets": [], "multipliers": [*PEER, *others]}, read_published())
    assert figure is not None and [axes.get_title() for axes in figure.axes] == ["PKM", "PEER", "the paper"]
    assert [len(axes.collections) for axes in figure.axes] == [2, 4, 0]  # bands, and dots of seeds


def test_budgets_below_the_trend_stand_apart_from_the_line() -> None:
    third = {**PEER[1], "budget": 1e13, "multiplier": 1.4}
    fits = {"budgets": [], "multipliers": [*PEER, third], "trend_from": 3e12}
    figure = multipliers_figure(fits, read_published())
    assert figure is not None and "points without a line" in figure.get_supxlabel()
    drawn = [np.asarray(line.get_ydata(), float).tolist() for line in figure.axes[0].lines]
    assert drawn[1] == [1.3, 1.4] and [1.1] in drawn and [1.0, 1.2] in drawn


def test_a_multiplier_from_a_flagged_minimum_is_hollow() -> None:
    methods = [{"name": "peer", "status": "off_centre"}, {"name": "dense", "status": "ok"}]
    fits = {"budgets": [{"budget": 3e12, "methods": methods}], "multipliers": PEER}
    figure = multipliers_figure(fits, read_published())
    assert figure is not None and "hollow: flagged minimum" in figure.get_supxlabel()
    hollow = [np.asarray(line.get_ydata(), float).tolist() for line in figure.axes[0].lines
              if line.get_markerfacecolor() == "white" and len(line.get_ydata())]  # fmt: skip
    assert hollow == [[1.3]]


def test_one_budget_makes_no_figure() -> None:
    assert multipliers_figure({"budgets": [], "multipliers": PEER[:1]}, read_published()) is None


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
