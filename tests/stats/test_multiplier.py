"""Compute multipliers on frontiers whose multiplier is known."""

import numpy as np
import pytest

from peerscale.api import compute_multipliers
from peerscale.stats.multiplier import compute_to_reach

BUDGETS = np.array([1e12, 3e12, 1e13, 3e13])
NAN = np.nan


def power_law(gain: float = 1.0, budgets: np.ndarray = BUDGETS) -> tuple[np.ndarray, np.ndarray]:
    """Compute and loss of a method that makes `gain` times as much of its compute as dense."""
    return budgets, 40 * (gain * budgets) ** -0.07


@pytest.mark.parametrize("gain", [0.4, 0.8, 1.0, 1.3, 2.9])
def test_the_gain_of_a_power_law_is_found_at_every_budget(gain: float) -> None:
    assert compute_multipliers(power_law(), power_law(gain)) == pytest.approx([gain] * 4, rel=1e-9)


@pytest.mark.parametrize("gain", [0.2, 5.0])
def test_a_gain_wider_than_the_frontiers_overlap_has_no_number(gain: float) -> None:
    """Between budgets a factor of 3 apart five times the compute is beyond the frontier, but not over two of them."""
    found = compute_multipliers(power_law(), power_law(gain))
    assert np.isnan(found[1])
    assert found[[0, 2, 3]] == pytest.approx([gain] * 3, rel=1e-9)
    assert np.isnan(compute_multipliers(power_law(budgets=BUDGETS[:1]), power_law(2.0, BUDGETS[:1]))).all()


def test_swapping_the_two_inverts_it() -> None:
    rng = np.random.default_rng(0)
    one, other = ((BUDGETS, np.sort(rng.uniform(4, 5, 4))[::-1]) for _ in range(2))
    forth, back = compute_multipliers(one, other), compute_multipliers(other, one)
    np.testing.assert_allclose(forth, 1 / back)
    assert np.isfinite(forth).any()


def test_levels_by_hand() -> None:
    """At the smallest budget the lower loss is the level, at the others the higher."""
    dense = BUDGETS[:2], np.array([4.0, 3.0])
    method = BUDGETS[:2], np.array([3.8, 2.9])
    to_lower = 1e12 * 3 ** (np.log(4 / 3.8) / np.log(4 / 3))  # dense reaches the method's 3.8 there
    to_higher = 1e12 * 3 ** (np.log(3.8 / 3) / np.log(3.8 / 2.9))  # the method reaches dense's 3.0 there
    assert compute_multipliers(dense, method) == pytest.approx([to_lower / 1e12, 3e12 / to_higher])


def test_a_budget_without_a_loss_is_passed_over() -> None:
    compute, losses = power_law(2.0)
    gap = compute, np.where(BUDGETS == 3e12, NAN, losses)
    assert compute_multipliers(power_law(), gap) == pytest.approx([2, NAN, 2, 2], nan_ok=True)
    late = compute, np.where(BUDGETS == 1e12, NAN, losses)  # 3e12 is then the smallest that both have
    assert compute_multipliers(power_law(), late) == pytest.approx([NAN, 2, 2, 2], nan_ok=True)
    assert np.isnan(compute_multipliers(power_law(), (compute, np.full(4, NAN)))).all()
    only = compute, np.where(BUDGETS == 1e13, losses, NAN)
    assert compute_multipliers(power_law(), only) == pytest.approx([NAN, NAN, 2, NAN], nan_ok=True)


def test_compute_may_be_counted_differently() -> None:
    """With everything else equal, a method whose compute counts half is worth twice as much."""
    compute, losses = power_law(1.2)
    assert compute_multipliers(power_law(), (compute / 2, losses)) == pytest.approx([2.4] * 4)


def test_a_trend_depends_on_nothing_outside_it() -> None:
    """Whatever the losses of the smallest budget, which compares itself with all."""
    trend = np.array([False, True, True, True])
    (budgets, dense), (_, method) = power_law(), power_law(1.5)
    shifted = method - np.array([0.05, 0, 0, 0])
    for losses in (method, shifted):
        found = compute_multipliers((budgets, dense), (budgets, losses), trend)
        alone = compute_multipliers((budgets[1:], dense[1:]), (budgets[1:], losses[1:]))
        np.testing.assert_array_equal(found[1:], alone)
        assert found[0] == compute_multipliers((budgets, dense), (budgets, losses))[0]
    assert compute_multipliers((budgets, dense), (budgets, shifted))[1] != pytest.approx(alone[0], rel=0.01)


def test_draws_at_once_equal_one_by_one() -> None:
    rng = np.random.default_rng(1)
    dense, method = (power_law(gain)[1] * (1 + 0.02 * rng.normal(size=(50, 4))) for gain in (1.0, 1.5))
    method[rng.random((50, 4)) < 0.2] = NAN
    found = compute_multipliers((BUDGETS, dense), (BUDGETS, method))
    rows = [compute_multipliers((BUDGETS, d), (BUDGETS, m)) for d, m in zip(dense, method, strict=True)]
    np.testing.assert_array_equal(found, rows)
    assert 0.4 < np.isfinite(found).mean() < 0.9


def reach_by_steps(losses: np.ndarray, level: float) -> float:
    """Walk along the frontier, which never rises, in small steps of log C until the loss is reached."""
    known = np.isfinite(losses)
    losses = np.minimum.accumulate(losses[known])
    log_c = np.linspace(np.log(BUDGETS[known][0]), np.log(BUDGETS[known][-1]), 200_001)
    path = np.interp(log_c, np.log(BUDGETS[known]), np.log(losses))
    there = path <= np.log(level) + 1e-12
    return float(np.exp(log_c[there.argmax()])) if there.any() and path[0] >= np.log(level) else NAN


@pytest.mark.parametrize(
    "losses", [[4.0, 3.0, 3.2, 2.0], [4.0, NAN, 3.2, 2.0], [NAN, 4.0, 4.1, 3.0], [4.0, 3.9, 3.8, NAN]]
)
def test_the_least_compute_that_reaches_a_loss(losses: list[float]) -> None:
    """A larger budget never counts as worse."""
    levels = np.array([4.5, 4.0, 3.95, 3.5, 3.1, 3.0, 2.5, 2.0, 1.9])
    expected = [reach_by_steps(np.array(losses), level) for level in levels]
    np.testing.assert_allclose(compute_to_reach(BUDGETS, np.array(losses), levels), expected, rtol=1e-4)
