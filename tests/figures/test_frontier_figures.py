"""The frontier draws the numbers of fits.json."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from peerscale.figures.frontier import frontier_figure
from toy_study import fits_with_curves


def method(name: str, loss: float | None, status: str = "ok") -> dict[str, Any]:
    ends = {} if loss is None else {"low": loss - 0.02, "high": loss + 0.03}
    return {"name": name, "loss": loss, "status": status, **ends}


FITS: dict[str, Any] = {
    "budgets": [
        {"budget": 1e11, "methods": [method("dense", 5.0), method("peer", 4.9), method("pkm", None, "too_few")]},
        {"budget": 3e11, "methods": [method("dense", 4.7), method("peer", 4.6, "off_centre")]},
    ],
    "multipliers": [
        {"method": "peer", "reference": "dense", "budget": 1e11, "multiplier": 1.2, "low": 1.1, "high": 1.4},
        {"method": "peer", "reference": "dense", "budget": 3e11, "multiplier": 1.5, "low": 1.3, "high": 1.8},
    ],
}


def points(axes: Axes) -> dict[str, np.ndarray]:
    return {str(c.get_label()): np.asarray(c.lines[0].get_xydata(), float) for c in axes.containers}


def test_losses_and_multipliers_with_their_intervals() -> None:
    figure = frontier_figure(fits_with_curves(FITS))
    assert figure is not None
    losses, multipliers = figure.axes
    drawn = points(losses)
    assert set(drawn) == {"dense", "peer"}
    np.testing.assert_allclose(drawn["peer"][:, 1], [4.9, 4.6])
    for name in drawn:  # beside its budget a point of a steep curve would seem to have another loss
        np.testing.assert_array_equal(drawn[name][:, 0], [1e11, 3e11])
    np.testing.assert_allclose(points(multipliers)["peer"][:, 1], [1.2, 1.5])
    (peer,) = multipliers.containers
    segments = peer.lines[2][0].get_segments()
    np.testing.assert_allclose([segment[:, 1] for segment in segments], [(1.1, 1.4), (1.3, 1.8)])
    figure.draw_without_rendering()


def test_only_a_flagged_minimum_is_hollow() -> None:
    figure = frontier_figure(fits_with_curves(FITS))
    assert figure is not None
    hollow = [line for line in figure.axes[0].lines if line.get_markerfacecolor() == "white" and len(line.get_xdata())]
    assert [line.get_xydata().tolist() for line in hollow] == [[[3e11, 4.6]]]


def test_without_multipliers_there_is_a_frontier_alone() -> None:
    figure = frontier_figure(fits_with_curves({**FITS, "multipliers": []}))
    assert figure is not None and len(figure.axes) == 1


def test_no_minimum_is_no_figure() -> None:
    assert frontier_figure(fits_with_curves({"budgets": [], "multipliers": []})) is None
    unfitted = {"budgets": [{"budget": 1e11, "methods": [method("pkm", None, "too_few")]}], "multipliers": []}
    assert frontier_figure(fits_with_curves(unfitted)) is None


def test_nothing_is_drawn_beyond_the_page() -> None:
    figure = frontier_figure(fits_with_curves(FITS))
    assert figure is not None
    figure.draw_without_rendering()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert box.x0 >= -0.01 and box.x1 <= width + 0.01 and box.y0 >= -0.01 and box.y1 <= height + 0.01
