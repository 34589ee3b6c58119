import math
from itertools import combinations

import numpy as np
import pandas as pd
import pytest

from peerscale.laws.linear_fit import StudentValue
from peerscale.stats.standing import difference, multiplier, ranks, reference_frontier, tuning_error


def runs(sizes: list[float], shift: float = 0.0, seeds: int = 3, noise: float = 0.0, budget: float = 1e13, rng=None):
    rng = rng or np.random.default_rng(0)
    rows = [
        {"cell": f"{shift}-{x}-{seed}", "budget": budget, "flops_per_token": x, "seed": seed,
         "val_loss": 4.0 - 0.2 * math.log10(budget / 1e13) + 0.3 * math.log10(x / 1e6) ** 2 + shift
         + (rng.normal(0, noise) if noise else 0)}
        for x in sizes for seed in range(seeds)
    ]  # fmt: skip
    return pd.DataFrame(rows)


REFERENCE = [4e5, 7e5, 1e6, 1.6e6, 2.5e6]
ENTRANT = [6.1e5, 1.1e6, 1.7e6]


def test_the_difference_is_at_equal_flops_per_token() -> None:
    assert difference(runs(ENTRANT, -0.03), runs(REFERENCE)).value == pytest.approx(-0.03)


def test_its_interval_covers_the_truth() -> None:
    """Noise of seeds, with an entrant twice as noisy as the reference; 95 % expected, within 4 s.e. of 400 draws."""
    rng, inside = np.random.default_rng(5), 0
    for _ in range(400):
        found = difference(runs(ENTRANT, -0.02, noise=0.016, rng=rng), runs(REFERENCE, noise=0.008, rng=rng))
        low, high = found.interval
        inside += low < -0.02 < high
    assert 0.91 < inside / 400 < 0.99


def test_the_error_of_tuning_is_added_in_quadrature() -> None:
    rng = np.random.default_rng(1)
    entrant, reference = runs(ENTRANT, noise=0.01, rng=rng), runs(REFERENCE, noise=0.01, rng=rng)
    alone, both = difference(entrant, reference), difference(entrant, reference, tuning=[(0.02, 2.0)])
    assert both.se == pytest.approx(math.hypot(alone.se, 0.02)) and both.value == alone.value


def test_finalists_that_differ_by_seeds_alone_have_no_error_of_tuning() -> None:
    seeds = pd.DataFrame({"point": [1, 1, 2, 2, 3, 3], "val_loss": [4.0, 4.2, 4.05, 4.15, 4.01, 4.19]})
    assert tuning_error(seeds) == (0.0, 2.0)
    apart = seeds.assign(val_loss=[4.0, 4.0, 4.1, 4.1, 4.2, 4.2])
    assert tuning_error(apart) == (pytest.approx(0.1), 2.0)


def test_a_finalist_that_diverged_does_not_make_a_row_more_certain() -> None:
    finals = pd.DataFrame({"point": [1, 1, 2, 2, 3, 3], "val_loss": [4.0, 4.02, 4.1, 4.12, 4.2, 4.22]})
    whole, missing = tuning_error(finals), tuning_error(finals[:-1])
    assert whole[0] == pytest.approx(math.sqrt(0.1**2 - 0.0002 / 2)) and whole[1] == missing[1] == 2
    means, of_seeds = [4.01, 4.11, 4.2], 0.0002 * (1 / 2 + 1 / 2 + 1) / 3
    assert missing[0] == pytest.approx(math.sqrt(np.var(means, ddof=1) - of_seeds))
    for unknown in (finals[:2], finals[::2]):
        assert all(map(math.isnan, tuning_error(unknown)))
    row = difference(runs(ENTRANT), runs(REFERENCE), tuning=[tuning_error(finals[:2]), whole])
    assert math.isfinite(row.value) and all(map(math.isnan, (row.se, row.p, *row.interval)))


def test_multipliers_are_interpolated_and_bounded() -> None:
    reference = pd.concat([runs(REFERENCE, budget=budget) for budget in (1e12, 1e13, 1e14)])
    frontier = reference_frontier(reference)
    assert frontier[1] == pytest.approx([4.2, 4.0, 3.8])
    found = StudentValue(value=-0.1, se=0.02, df=1e9)
    value, low, high = multiplier(found, 1e13, frontier)
    # log10 of compute is linear in the log of the loss between 4.0 and 3.8
    assert value == pytest.approx(10 ** (math.log(3.9 / 4.0) / math.log(3.8 / 4.0)))
    assert low < value < high
    assert multiplier(StudentValue(value=-0.3, se=0.01, df=9), 1e13, frontier)[0] == math.inf
    assert multiplier(StudentValue(value=0.3, se=0.01, df=9), 1e13, frontier)[0] == 0
    assert math.isnan(multiplier(StudentValue(value=0.0, se=0.01, df=9), 3e13, frontier)[0]), "no optimum there"
    assert multiplier(StudentValue(value=0.0, se=0.01, df=9), 1e13, frontier)[0] == pytest.approx(1)


def test_the_difference_of_two_has_nothing_of_what_they_have_in_common() -> None:
    """95 % of the intervals cover the truth, within 4 s.e. of 400 draws, and are the narrower for it."""
    rng, inside, narrower = np.random.default_rng(6), 0, 0
    tuned, usual = [(0.004, 2.0), (0.003, 2.0)], [(0.004, 2.0), (0.005, 2.0)]
    for _ in range(400):
        one, other = (runs(ENTRANT, shift, noise=0.006, rng=rng) for shift in (-0.02, -0.05))
        reference = runs(REFERENCE, noise=0.012, rng=rng)
        found = difference(one, reference, other=other)
        each = [difference(entrant, reference) for entrant in (one, other)]
        assert found.value == pytest.approx(each[0].value - each[1].value)
        low, high = found.interval
        inside += low < 0.03 < high
        narrower += found.se < math.hypot(*(alone.se for alone in each))
    assert 0.91 < inside / 400 < 0.99 and narrower > 390
    assert difference(one, reference, None, tuned, other).se == pytest.approx(math.hypot(found.se, 0.005))
    assert difference(one, reference, None, usual, other).rate_se == pytest.approx(math.hypot(0.004, 0.005))


def test_the_errors_of_both_sides_tuning_are_independent() -> None:
    """Where there is no other error, its degrees of freedom are those of Satterthwaite: (a + b)^2 / (a^2/2 + b^2/2)."""
    quiet = difference(runs(ENTRANT), runs(REFERENCE), tuning=[(0.02, 2.0), (0.02, 2.0)])
    assert quiet.df == pytest.approx(4, rel=0.01)
    uneven = difference(runs(ENTRANT), runs(REFERENCE), tuning=[(0.02, 2.0), (0.01, 2.0)])
    assert uneven.df == pytest.approx(25 / (16 / 2 + 1 / 2), rel=0.01)


def test_rows_have_a_rank_in_common_unless_they_are_told_apart() -> None:
    assert ranks(4, []) == ["1"] * 4
    assert ranks(3, [(0, 1), (0, 2), (1, 2)]) == ["1", "2", "3"]
    assert ranks(4, [(0, 2), (0, 3), (1, 3)]) == ["1", "1, 2", "2, 3", "3"]
    rng = np.random.default_rng(0)
    for _ in range(50):
        told_apart = [pair for pair in combinations(range(7), 2) if rng.random() < 0.5]
        found = [{*rank.split(", ")} for rank in ranks(7, told_apart)]
        assert all(bool(found[i] & found[j]) == ((i, j) not in told_apart) for i, j in combinations(range(7), 2))
        rows = [{row for row in range(7) if rank in found[row]} for rank in set.union(*found)]
        assert not any(one < other for one in rows for other in rows), "no rank is a part of another"
