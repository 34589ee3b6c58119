"""Repeated data: equations 5 and 6 written out, and recovery of the constants."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize_scalar

from peerscale.laws import fit_data_constrained
from peerscale.laws.data_constrained import DataConstrainedFit, DataConstrainedLaw
from peerscale.laws.solver import FitStatus

TRUTH = DataConstrainedLaw(E=1.87, A=521.0, B=1488.0, alpha=0.353, beta=0.353, R_N=5.31, R_D=15.39)
NAMES = ("E", "A", "B", "alpha", "beta", "R_N", "R_D")


def runs(noise: float = 0.0) -> pd.DataFrame:
    rows = [
        (n, unique * epochs, unique)
        for n in (1e7, 5e7, 2e8, 8e8, 3e9)
        for unique in (1e8, 1e9, 5e9)
        for epochs in (0.5, 1, 4, 10, 40, 100)
    ]
    table = pd.DataFrame(rows, columns=["N", "D", "U"])
    loss = TRUTH.predict(table["N"], table["D"], table["U"])
    return table.assign(loss=loss * np.exp(noise * np.random.default_rng(0).standard_normal(len(table))))


def fit(table: pd.DataFrame, **options) -> DataConstrainedFit:
    return fit_data_constrained(table, params="N", tokens="D", unique_tokens="U", loss="loss", **options)


@pytest.mark.parametrize(("n", "d", "unique"), [(1e8, 4e9, 1e9), (3e9, 4e10, 1e9), (1e7, 1e9, 1e9), (5e9, 1e9, 4e9)])
def test_effective_counts_as_in_the_paper(n: float, d: float, unique: float) -> None:
    base_d = min(unique, d)
    # The compute-optimal size for base_d tokens, found by search: no budget spends more tokens at its optimum.
    log_budget = minimize_scalar(
        lambda log_c: (math.log(TRUTH.optimum(math.exp(log_c)).tokens) - math.log(base_d)) ** 2, bracket=(40, 50)
    ).x
    base_n = min(TRUTH.optimum(math.exp(log_budget)).params, n)
    repeats_d, repeats_n = d / base_d - 1, n / base_n - 1
    effective_d = base_d + base_d * 15.39 * (1 - math.exp(-repeats_d / 15.39))
    effective_n = base_n + base_n * 5.31 * (1 - math.exp(-repeats_n / 5.31))
    expected = 1.87 + 521 / effective_n**0.353 + 1488 / effective_d**0.353
    assert TRUTH.predict(n, d, unique) == pytest.approx(expected, rel=1e-6)


def test_repeating_helps_less_and_less() -> None:
    losses = TRUTH.predict(2e7, 1e9 * np.array([1, 2, 4, 16, 64, 1000]), 1e9)
    assert np.all(np.diff(losses) < 0)
    fresh = TRUTH.predict(2e7, 1e9 * np.array([2, 4, 16]))
    assert np.all(losses[1:4] > fresh) and losses[1] == pytest.approx(fresh[0], abs=0.01)


def test_recovers_the_constants() -> None:
    result = fit(runs())
    assert result.status is FitStatus.CONVERGED
    for name in NAMES:
        assert getattr(result, name) == pytest.approx(getattr(TRUTH, name), rel=1e-4), name


def test_intervals_under_noise() -> None:
    result = fit(runs(noise=0.005), objective="mse-log", bootstrap=60)
    assert pytest.approx(15.39, rel=0.15) == result.R_D
    assert result.ci["R_D"][0] < 15.39 < result.ci["R_D"][1]
    low, high = result.interval(lambda law: law.predict(1e9, 4e10, 1e9))
    assert low < TRUTH.predict(1e9, 4e10, 1e9) < high
