"""The paired bootstrap against loops, against parabolas of known minimum, and against the delta method."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peerscale.laws.bootstrap import percentile_interval, resampled_losses
from peerscale.laws.isoflop import fit_parabolas, minima

SIZES = np.array([1e5, 2e5, 3.5e5, 7e5, 1.3e6])


def optimum_losses(x: np.ndarray, losses: np.ndarray) -> np.ndarray:
    return minima(fit_parabolas(x, losses))[1]


def sequences(rng: np.random.Generator, shared: float, own: float, means: np.ndarray, n: int = 400) -> np.ndarray:
    """(runs, n) losses: a part common to all runs, and noise of each run's own."""
    return means[:, None] + rng.normal(0, shared, n) + rng.normal(0, own, (len(means), n))


@given(minimum=st.floats(1, 9), curvature=st.floats(0.05, 5), centre=st.floats(5.1, 6.0))
def test_minimum_of_an_exact_parabola(minimum: float, curvature: float, centre: float) -> None:
    losses = minimum + curvature * (np.log10(SIZES) - centre) ** 2
    assert optimum_losses(SIZES, losses[None])[0] == pytest.approx(minimum, abs=1e-8)


def test_many_fits_at_once_equal_a_loop_of_polyfit() -> None:
    rng = np.random.default_rng(0)
    losses = 4 + (np.log10(SIZES) - 5.5) ** 2 + rng.normal(0, 0.02, (50, 5))
    one_by_one = []
    for row in losses:
        c2, c1, c0 = np.polyfit(np.log10(SIZES), row, 2)
        one_by_one.append(c0 - c1**2 / (4 * c2))
    np.testing.assert_allclose(optimum_losses(SIZES, losses), one_by_one, atol=1e-8)


def test_no_minimum_is_nan() -> None:
    bowl = 4 + (np.log10(SIZES) - 5.5) ** 2
    optima = optimum_losses(SIZES, np.stack([bowl, -bowl]))
    assert np.isfinite(optima[0]) and np.isnan(optima[1])


def test_every_run_sees_the_same_sequences() -> None:
    losses = np.random.default_rng(1).normal(4, 0.5, 300)
    drawn = resampled_losses(np.stack([losses, losses + 0.25, losses]), resamples=50)
    assert drawn[:, 0].std() > 0.01
    np.testing.assert_allclose(drawn[:, 1] - drawn[:, 0], 0.25)
    np.testing.assert_allclose(drawn[:, 2], drawn[:, 0])
    np.testing.assert_allclose(resampled_losses(losses[None], resamples=50)[:, 0], drawn[:, 0])
    assert not np.allclose(resampled_losses(losses[None], resamples=50, seed=1)[:, 0], drawn[:, 0])


def test_difficulty_common_to_all_runs_leaves_no_interval() -> None:
    means = 4 + (np.log10(SIZES) - 5.5) ** 2
    losses = sequences(np.random.default_rng(2), shared=0.5, own=0.0, means=np.concatenate([means, means - 0.1]))
    drawn = resampled_losses(losses, resamples=200)
    dense, peer = optimum_losses(SIZES, drawn[:, :5]), optimum_losses(SIZES, drawn[:, 5:])
    assert np.ptp(dense) > 0.05
    np.testing.assert_allclose(peer - dense, -0.1, atol=1e-9)


def test_interval_agrees_with_the_delta_method() -> None:
    """The minimum's loss moves with run i's loss by w_i, the weight of run i in the fit evaluated at the minimum."""
    z = np.log10(SIZES)
    means = 4 + (z - 5.5) ** 2
    losses = sequences(np.random.default_rng(3), shared=0.5, own=0.08, means=np.concatenate([means, means - 0.1]))
    design = np.vander(z, 3, increasing=True)
    weighted = []
    for runs in (losses[:5], losses[5:]):
        _, c1, c2 = np.linalg.solve(design.T @ design, design.T @ runs.mean(axis=1))
        at_minimum = np.array([1, -c1 / (2 * c2), (c1 / (2 * c2)) ** 2])
        weighted.append(at_minimum @ np.linalg.solve(design.T @ design, design.T) @ runs)
    difference = weighted[1] - weighted[0]
    standard_error = difference.std(ddof=1) / np.sqrt(len(difference))

    drawn = resampled_losses(losses)
    low, high = percentile_interval(optimum_losses(SIZES, drawn[:, 5:]) - optimum_losses(SIZES, drawn[:, :5]))
    assert (low + high) / 2 == pytest.approx(difference.mean(), abs=0.15 * standard_error)
    assert high - low == pytest.approx(2 * 1.96 * standard_error, rel=0.08)
