"""The main figure draws the multipliers of fits.json, and beside them the paper's."""

import math

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from peerscale.figures.multipliers import APART, multipliers_figure, paper_multipliers
from peerscale.figures.published import read_published
from toy_study import fits_with_curves

PEER = [
    {"method": "peer", "reference": "dense", "budget": 1e12, "multiplier": 1.1, "low": 1.0, "high": 1.2},
    {"method": "peer", "reference": "dense", "budget": 3e12, "multiplier": 1.3, "low": 1.2, "high": 1.5},
]
NO_RUNS = pd.DataFrame(columns=["curve", "size", "budget", "flops_per_token"])


def drawn(**fits: object) -> Figure:
    found = fits_with_curves({"budgets": [], "multipliers": PEER, **fits})
    figure = multipliers_figure(found, read_published(), NO_RUNS)
    assert figure is not None
    figure.draw_without_rendering()
    return figure


def lines(axes: Axes) -> dict[str, np.ndarray]:
    """The points of each method with a line or bars, by label."""
    found = (container for container in axes.containers if isinstance(container, ErrorbarContainer))
    return {str(container.get_label()): np.asarray(container.lines[0].get_xydata(), float) for container in found}


def intervals(axes: Axes, label: str) -> list[list[float]]:
    (found,) = (one for one in axes.containers if one.get_label() == label)
    return [segment[:, 1].tolist() for segment in found.lines[2][0].get_segments()]


def test_multipliers_and_their_intervals() -> None:
    ours, paper = drawn().axes
    assert paper.get_title() == "the paper" and [*lines(paper)] == ["peer"]
    np.testing.assert_allclose(lines(ours)["peer"], [(1e12, 1.1), (3e12, 1.3)])
    np.testing.assert_allclose(intervals(ours, "peer"), [(1.0, 1.2), (1.2, 1.5)])


def test_all_methods_are_on_one_axis_side_by_side() -> None:
    others = [{**one, "method": name} for one in PEER for name in ("pkm", "peer n_experts=16384")]
    ours, paper = drawn(multipliers=[*PEER, *others]).axes
    assert [*lines(ours)] == ["pkm", "peer", "peer n_experts=16384"] and [*lines(paper)] == ["pkm", "peer"]
    places = [points[:, 0] for points in lines(ours).values()]
    np.testing.assert_allclose(places, np.outer([1 / APART, 1, APART], [1e12, 3e12]))


def test_budgets_below_the_trend_stand_apart_from_the_line() -> None:
    figure = drawn(multipliers=[*PEER, {**PEER[1], "budget": 1e13, "multiplier": 1.4}], trend_from=3e12)
    assert figure.get_supxlabel().startswith(r"lines start at $3 \times 10^{12}$ FLOPs")
    assert not drawn().get_supxlabel().startswith("lines")
    ours = figure.axes[0]
    np.testing.assert_allclose(lines(ours)["peer"][:, 1], [1.3, 1.4])
    np.testing.assert_allclose(lines(ours)["peer apart"], [(1e12, 1.1)])
    assert intervals(ours, "peer apart") == [[1.0, 1.2]]


def test_a_multiplier_from_a_flagged_minimum_is_hollow() -> None:
    methods = [{"name": "peer", "status": "off_centre"}, {"name": "dense", "status": "ok", "loss": None}]
    ours = drawn(budgets=[{"budget": 3e12, "methods": methods, "differences": []}]).axes[0]
    hollow = [np.asarray(line.get_ydata(), float).tolist() for line in ours.lines
              if line.get_markerfacecolor() == "white" and len(line.get_ydata())]  # fmt: skip
    assert hollow == [[1.3]]


def test_one_budget_makes_no_figure() -> None:
    fits = fits_with_curves({"budgets": [], "multipliers": PEER[:1]})
    assert multipliers_figure(fits, read_published(), NO_RUNS) is None


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
