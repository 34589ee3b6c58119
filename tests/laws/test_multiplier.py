"""Effective compute on frontiers whose multiplier is known."""

import numpy as np
import pandas as pd
import pytest

from peerscale.laws import compute_multipliers, fit_isoflop
from peerscale.laws.isoflop import IsoflopFit
from peerscale.laws.multiplier import compute_to_reach

BUDGETS = np.array([1e15, 1e16, 1e17, 1e18])


def frontier(
    gain: float = 1.0, *, budgets: np.ndarray = BUDGETS, noise: float = 0.0, seed: int = 0, **options
) -> IsoflopFit:
    """A method whose best loss at C is 40 (gain C)^-0.07: `gain` times the dense model's compute."""
    rng = np.random.default_rng(seed)
    rows = [
        (c, c**0.5 * factor, 40 * (gain * c) ** -0.07 + 0.2 * np.log10(factor) ** 2 + noise * rng.normal())
        for c in budgets
        for factor in (0.25, 0.5, 1, 2, 4)
    ]
    table = pd.DataFrame(rows, columns=["C", "x", "loss"])
    return fit_isoflop(table, budget="C", x="x", loss="loss", **options)


def test_gain_is_recovered_within_and_beyond_the_dense_budgets() -> None:
    found = compute_multipliers(frontier(), frontier(3.0))
    assert [item.multiplier for item in found] == pytest.approx([3.0] * 4, rel=1e-6)
    assert [item.extrapolated for item in found] == [False, False, False, True]
    assert [item.budget for item in found] == BUDGETS.tolist()
    assert all(item.interval is None for item in found)
    worse = compute_multipliers(frontier(), frontier(0.5))
    assert [item.multiplier for item in worse] == pytest.approx([0.5] * 4, rel=1e-6)
    assert worse[0].extrapolated


def test_a_method_of_one_budget_has_a_multiplier() -> None:
    method = frontier(2.0, budgets=np.array([1e16]))
    assert method.exponent is None
    (only,) = compute_multipliers(frontier(), method)
    assert only.multiplier == pytest.approx(2.0)


def test_interval_covers_the_gain_and_pairs_draws_independently() -> None:
    dense, method = (frontier(gain, noise=0.003, seed=seed, bootstrap=500) for gain, seed in ((1.0, 1), (2.0, 2)))
    for item in compute_multipliers(dense, method):
        low, high = item.interval
        assert low < item.multiplier < high and 1 < high / low < 1.6
    # The same runs against themselves: draws of one seed would cancel and leave no width at all.
    for item in compute_multipliers(dense, dense):
        assert item.multiplier == pytest.approx(1) and item.interval[1] / item.interval[0] > 1.02


def test_no_frontier_no_multiplier() -> None:
    assert compute_multipliers(frontier(budgets=BUDGETS[:1]), frontier(2.0)) == ()
    assert np.isnan(compute_to_reach(BUDGETS, np.array([2.0, 2.1, 2.2, 2.3]), 2.1))


def test_a_larger_budget_never_counts_as_worse() -> None:
    losses = np.array([4.0, 3.0, 3.2, 2.0])
    assert compute_to_reach(BUDGETS, losses, 3.5) == pytest.approx(10 ** (15 + np.log(4 / 3.5) / np.log(4 / 3)))
    assert 1e17 < compute_to_reach(BUDGETS, losses, 2.9) < 1e18
