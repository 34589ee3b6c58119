"""The fine-grained law on its authors' kind of design: exact without noise, predictions only with it."""

import json

import numpy as np
import pandas as pd
import pytest

from peerscale.errors import UserError
from peerscale.laws import fit_granular
from peerscale.laws.moe import GranularFit, GranularLaw
from peerscale.laws.solver import FitStatus

TRUTH = GranularLaw(a=18.1, alpha=0.115, b=30.8, beta=0.147, g=2.1, gamma=0.58, c=0.47)
NAMES = ("a", "alpha", "b", "beta", "g", "gamma", "c")


def runs(noise: float = 0.0, seed: int = 0) -> pd.DataFrame:
    rows = [
        (n, d, g, 18.1 / n**0.115 + 2.1 / g**0.58 / n**0.115 + 30.8 / d**0.147 + 0.47)
        for n in (1.3e8, 3e8, 6e8, 1.5e9, 3.6e9)
        for d in (1.6e10, 3.3e10, 6.6e10)
        for g in (1, 2, 4, 8, 16)
    ]
    table = pd.DataFrame(rows, columns=["N", "D", "G", "loss"])
    return table.assign(loss=table["loss"] + noise * np.random.default_rng(seed).standard_normal(len(table)))


def fit(table: pd.DataFrame, **options) -> GranularFit:
    return fit_granular(table, params="N", tokens="D", granularity="G", loss="loss", **options)


def test_recovers_all_seven_coefficients_without_noise() -> None:
    result = fit(runs())
    assert result.status is FitStatus.CONVERGED
    for name in NAMES:
        assert getattr(result, name) == pytest.approx(getattr(TRUTH, name), rel=1e-5), name


@pytest.mark.parametrize("seed", range(3))
def test_under_realistic_noise_predictions_hold_and_coefficients_do_not(seed: int) -> None:
    clean, result = runs(), fit(runs(noise=0.015, seed=seed))
    assert result.status in (FitStatus.NOT_IDENTIFIABLE, FitStatus.AT_BOUND)
    predicted = result.predict(clean["N"], clean["D"], clean["G"])
    assert np.sqrt(np.mean((predicted - clean["loss"]) ** 2)) < 0.008
    assert result.predict(4.3e9, 1e11, 16) == pytest.approx(TRUTH.predict(4.3e9, 1e11, 16), abs=0.03)


def test_one_granularity_cannot_tell_g_from_a() -> None:
    assert fit(runs(noise=0.0001).query("G == 4")).status is not FitStatus.CONVERGED


def test_intervals_and_json() -> None:
    result = fit(runs(noise=0.005), bootstrap=100)
    low, high = result.interval(lambda law: law.predict(4.3e9, 1e11, 16))
    assert low < TRUTH.predict(4.3e9, 1e11, 16) < high and high - low < 0.03
    stored = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert {"law", "n", "status", "objective_name", "objective_value", "ci", *NAMES} <= stored.keys()
    assert stored["ci"].keys() == set(NAMES)


def test_too_few_rows() -> None:
    with pytest.raises(UserError, match=r"6 rows are too few .* 7 coefficients"):
        fit(runs().head(6))
