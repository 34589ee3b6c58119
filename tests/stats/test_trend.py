"""A line through few estimates, against numpy's weighted fit and against simulated points."""

import numpy as np
import pytest

from peerscale.stats.trend import extrapolate

X, SE = np.array([12.0, 12.5, 13.0, 13.5]), np.array([0.004, 0.006, 0.008, 0.01])
FREE = np.full(4, 1e9)


def test_value_and_error_are_those_of_a_weighted_fit() -> None:
    y = 1.5 - 0.09 * X + 0.1 * SE * np.array([1, -1, 1, -1])
    found = extrapolate(X, y, SE, FREE, 14.0)
    line, covariance = np.polyfit(X, y, 1, w=1 / SE, cov="unscaled")
    to_value = np.array([14.0, 1.0])
    assert found.value == pytest.approx(line @ to_value)
    assert found.se == pytest.approx(np.sqrt(to_value @ covariance @ to_value))
    assert found.misfit < 1 and found.df > 1e9
    assert found.interval == pytest.approx((found.value - 1.95996 * found.se, found.value + 1.95996 * found.se))


def test_points_off_the_line_widen_the_interval() -> None:
    """By as much as their scatter exceeds their errors; numpy scales its covariance by just that."""
    y = 1.5 - 0.09 * X + 5 * SE * np.array([1, -1, 1, -1])
    found = extrapolate(X, y, SE, FREE, 14.0)
    _, covariance = np.polyfit(X, y, 1, w=1 / SE, cov=True)
    to_value = np.array([14.0, 1.0])
    assert found.misfit > 1 and found.se == pytest.approx(np.sqrt(to_value @ covariance @ to_value))


def test_degrees_of_freedom_lie_between_those_of_one_point_and_of_all() -> None:
    found = extrapolate(X, -0.09 * X, SE, np.array([14.0, 15, 16, 17]), 14.0)
    assert 14 < found.df < 14 + 15 + 16 + 17


@pytest.mark.parametrize("at", [13.25, 14.0])
def test_an_interval_holds_the_true_value_as_often_as_it_says(at: float) -> None:
    """Three points, each with an error that is itself estimated, of ten degrees of freedom."""
    rng, truth, hits, draws = np.random.default_rng(0), 1.5 - 0.09 * at, 0, 2000
    for _ in range(draws):
        se = SE[:3] * np.sqrt(rng.chisquare(10, 3) / 10)
        low, high = extrapolate(
            X[:3], 1.5 - 0.09 * X[:3] + SE[:3] * rng.normal(size=3), se, np.full(3, 10.0), at
        ).interval
        hits += low <= truth <= high
    assert 0.94 < hits / draws < 0.985  # the widening is never undone, so somewhat more than 95 %
