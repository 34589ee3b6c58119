"""The law of routed models against its own formulas written out, and against scipy's least squares."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import least_squares

from peerscale.errors import UserError
from peerscale.laws import fit_routed
from peerscale.laws.moe import RoutedFit, RoutedLaw, saturated_experts
from peerscale.laws.solver import FitStatus

TRUTH = RoutedLaw(a=-0.082, b=-0.108, c=0.009, d=1.104, E_start=1.85, E_max=314.5)
NAMES = ("a", "b", "c", "d", "E_start", "E_max")


def log10_loss(n: float, experts: float, a: float, b: float, c: float, d: float, start: float, top: float) -> float:
    """Equations 7 and 8, term by term."""
    saturated = 1 / (1 / (experts - 1 + 1 / (1 / start - 1 / top)) + 1 / top)
    n, e = math.log10(n), math.log10(saturated)
    return a * n + b * e + c * n * e + d


def runs(noise: float = 0.0, seed: int = 0) -> pd.DataFrame:
    coefficients = [getattr(TRUTH, name) for name in NAMES]
    rows = [
        (n, e, 10 ** log10_loss(n, e, *coefficients))
        for n in (1.5e7, 2.5e7, 5.5e7, 1.3e8, 3.7e8, 1.3e9)
        for e in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    ]
    table = pd.DataFrame(rows, columns=["N", "experts", "loss"])
    return table.assign(loss=table["loss"] * 10 ** (noise * np.random.default_rng(seed).standard_normal(len(table))))


def fit(table: pd.DataFrame, **options) -> RoutedFit:
    return fit_routed(table, dense_params="N", experts="experts", loss="loss", **options)


def test_recovers_the_law_without_noise() -> None:
    result = fit(runs())
    assert result.status is FitStatus.CONVERGED and result.rms_log10 < 1e-9
    for name in NAMES:
        assert getattr(result, name) == pytest.approx(getattr(TRUTH, name), rel=1e-4), name


@pytest.mark.parametrize("seed", range(3))
def test_no_worse_than_scipy_from_the_truth(seed: int) -> None:
    table = runs(noise=0.003, seed=seed)
    result = fit(table)

    def residuals(point: np.ndarray) -> list[float]:
        coefficients = [*point[:4], *np.exp(point[4:])]
        return [math.log(10) * log10_loss(n, e, *coefficients) - math.log(loss) for n, e, loss in table.to_numpy()]

    truth = [getattr(TRUTH, name) for name in NAMES]
    other = least_squares(residuals, [*truth[:4], *np.log(truth[4:])], x_scale="jac", xtol=1e-12, ftol=1e-12)
    assert result.objective_value <= 2 * other.cost * (1 + 1e-7)
    mine = [getattr(result, name) for name in NAMES]
    assert result.objective_value == pytest.approx(sum(r**2 for r in residuals([*mine[:4], *np.log(mine[4:])])))
    assert result.rms_log10 == pytest.approx(math.sqrt(result.objective_value / 60) / math.log(10))


def test_saturation_runs_from_start_to_maximum() -> None:
    def saturated(experts: float | np.ndarray) -> np.ndarray:
        return saturated_experts(experts, TRUTH.E_start, TRUTH.E_max)

    assert saturated(1) == pytest.approx(1.85)
    assert saturated(1e12) == pytest.approx(314.5)
    assert np.all(np.diff(saturated(np.array([1, 2, 8, 64, 512]))) > 0)


def test_effective_params_is_the_dense_size_of_equal_loss() -> None:
    for n, experts in ((2.5e7, 64), (1.3e9, 512)):
        size = TRUTH.effective_params(n, experts)
        assert size > n and TRUTH.predict(size, 1) == pytest.approx(TRUTH.predict(n, experts), rel=1e-12)
    assert TRUTH.effective_params(1e8, 1) == pytest.approx(1e8)


def test_one_number_of_experts_does_not_identify_the_law() -> None:
    assert fit(runs(noise=0.001).query("experts == 8")).status is not FitStatus.CONVERGED


def test_intervals_and_json() -> None:
    result = fit(runs(noise=0.003), bootstrap=200)
    for name in ("a", "b", "c", "d"):
        assert result.ci[name][0] < getattr(result, name) < result.ci[name][1]
    low, high = result.interval(lambda law: law.effective_params(1.3e9, 64))
    assert low < result.effective_params(1.3e9, 64) < high
    stored = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    keys = {"law", "n", "status", "objective_name", "objective_value", "ci", "rms_log10", *NAMES}
    assert keys <= stored.keys()


def test_bad_input_is_named() -> None:
    with pytest.raises(UserError, match="'experts' must be at least 1"):
        fit(runs().assign(experts=0.5))
    with pytest.raises(UserError, match="5 rows are too few"):
        fit(runs().head(5))
