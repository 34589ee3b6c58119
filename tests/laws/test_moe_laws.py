"""The routed law against scipy, the granular one on its authors' kind of design."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import least_squares

from peerscale.api import fit_granular, fit_routed
from peerscale.errors import UserError
from peerscale.laws.least_squares import FitStatus
from peerscale.laws.moe import GranularFit, GranularLaw, RoutedFit, RoutedLaw, saturated_experts

ROUTED = RoutedLaw(a=-0.082, b=-0.108, c=0.009, d=1.104, E_start=1.85, E_max=314.5)
ROUTED_NAMES = ("a", "b", "c", "d", "E_start", "E_max")


def log10_loss(n: float, experts: float, a: float, b: float, c: float, d: float, start: float, top: float) -> float:
    """Equations 7 and 8, term by term."""
    saturated = 1 / (1 / (experts - 1 + 1 / (1 / start - 1 / top)) + 1 / top)
    n, e = math.log10(n), math.log10(saturated)
    return a * n + b * e + c * n * e + d


def routed_runs(noise: float = 0.0, seed: int = 0) -> pd.DataFrame:
    coefficients = [getattr(ROUTED, name) for name in ROUTED_NAMES]
    rows = [
        (n, e, 10 ** log10_loss(n, e, *coefficients))
        for n in (1.5e7, 2.5e7, 5.5e7, 1.3e8, 3.7e8, 1.3e9)
        for e in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    ]
    table = pd.DataFrame(rows, columns=["N", "experts", "loss"])
    return table.assign(loss=table["loss"] * 10 ** (noise * np.random.default_rng(seed).standard_normal(len(table))))


def fitted_routed(table: pd.DataFrame, **options) -> RoutedFit:
    return fit_routed(table, dense_params="N", experts="experts", loss="loss", **options)


def test_recovers_the_law_without_noise() -> None:
    result = fitted_routed(routed_runs())
    assert result.status is FitStatus.CONVERGED and result.rms_log10 < 1e-9
    for name in ROUTED_NAMES:
        assert getattr(result, name) == pytest.approx(getattr(ROUTED, name), rel=1e-4), name


@pytest.mark.parametrize("seed", range(3))
def test_no_worse_than_scipy_from_the_truth(seed: int) -> None:
    table = routed_runs(noise=0.003, seed=seed)
    result = fitted_routed(table)

    def residuals(point: np.ndarray) -> list[float]:
        coefficients = [*point[:4], *np.exp(point[4:])]
        return [math.log(10) * log10_loss(n, e, *coefficients) - math.log(loss) for n, e, loss in table.to_numpy()]

    truth = [getattr(ROUTED, name) for name in ROUTED_NAMES]
    other = least_squares(residuals, [*truth[:4], *np.log(truth[4:])], x_scale="jac", xtol=1e-12, ftol=1e-12)
    assert result.objective_value <= 2 * other.cost * (1 + 1e-7)
    mine = [getattr(result, name) for name in ROUTED_NAMES]
    assert result.objective_value == pytest.approx(sum(r**2 for r in residuals([*mine[:4], *np.log(mine[4:])])))
    assert result.rms_log10 == pytest.approx(math.sqrt(result.objective_value / 60) / math.log(10))


def test_saturation_runs_from_start_to_maximum() -> None:
    def saturated(experts: float | np.ndarray) -> np.ndarray:
        return saturated_experts(experts, ROUTED.E_start, ROUTED.E_max)

    assert saturated(1) == pytest.approx(1.85)
    assert saturated(1e12) == pytest.approx(314.5)
    assert np.all(np.diff(saturated(np.array([1, 2, 8, 64, 512]))) > 0)


def test_effective_params_is_the_dense_size_of_equal_loss() -> None:
    for n, experts in ((2.5e7, 64), (1.3e9, 512)):
        size = ROUTED.effective_params(n, experts)
        assert size > n and ROUTED.predict(size, 1) == pytest.approx(ROUTED.predict(n, experts), rel=1e-12)
    assert ROUTED.effective_params(1e8, 1) == pytest.approx(1e8)


def test_one_number_of_experts_does_not_identify_the_law() -> None:
    assert fitted_routed(routed_runs(noise=0.001).query("experts == 8")).status is not FitStatus.CONVERGED


def test_bad_input_is_named_routed() -> None:
    with pytest.raises(UserError, match="'experts' must be at least 1"):
        fitted_routed(routed_runs().assign(experts=0.5))
    with pytest.raises(UserError, match="5 rows are too few"):
        fitted_routed(routed_runs().head(5))


GRANULAR = GranularLaw(a=18.1, alpha=0.115, b=30.8, beta=0.147, g=2.1, gamma=0.58, c=0.47)
GRANULAR_NAMES = ("a", "alpha", "b", "beta", "g", "gamma", "c")


def granular_runs(noise: float = 0.0, seed: int = 0) -> pd.DataFrame:
    rows = [
        (n, d, g, 18.1 / n**0.115 + 2.1 / g**0.58 / n**0.115 + 30.8 / d**0.147 + 0.47)
        for n in (1.3e8, 3e8, 6e8, 1.5e9, 3.6e9)
        for d in (1.6e10, 3.3e10, 6.6e10)
        for g in (1, 2, 4, 8, 16)
    ]
    table = pd.DataFrame(rows, columns=["N", "D", "G", "loss"])
    return table.assign(loss=table["loss"] + noise * np.random.default_rng(seed).standard_normal(len(table)))


def fitted_granular(table: pd.DataFrame, **options) -> GranularFit:
    return fit_granular(table, params="N", tokens="D", granularity="G", loss="loss", **options)


def test_recovers_all_seven_coefficients_without_noise() -> None:
    result = fitted_granular(granular_runs())
    assert result.status is FitStatus.CONVERGED
    for name in GRANULAR_NAMES:
        assert getattr(result, name) == pytest.approx(getattr(GRANULAR, name), rel=1e-5), name


@pytest.mark.parametrize("seed", range(3))
def test_under_realistic_noise_predictions_hold_and_coefficients_do_not(seed: int) -> None:
    clean, result = granular_runs(), fitted_granular(granular_runs(noise=0.015, seed=seed))
    assert result.status in (FitStatus.NOT_IDENTIFIABLE, FitStatus.AT_BOUND)
    predicted = result.predict(clean["N"], clean["D"], clean["G"])
    assert np.sqrt(np.mean((predicted - clean["loss"]) ** 2)) < 0.008
    assert result.predict(4.3e9, 1e11, 16) == pytest.approx(GRANULAR.predict(4.3e9, 1e11, 16), abs=0.03)


def test_one_granularity_cannot_tell_g_from_a() -> None:
    assert fitted_granular(granular_runs(noise=0.0001).query("G == 4")).status is not FitStatus.CONVERGED


def test_too_few_rows() -> None:
    with pytest.raises(UserError, match=r"6 rows are too few .* 7 coefficients"):
        fitted_granular(granular_runs().head(6))
