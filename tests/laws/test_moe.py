"""The routed law against scipy, the granular one on its authors' kind of design, ours on data of each of its forms."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import least_squares

from peerscale.errors import UserError
from peerscale.laws import fit_granular, fit_peer, fit_routed
from peerscale.laws.moe import (
    FORMS,
    GranularFit,
    GranularLaw,
    PeerFit,
    PeerLaw,
    RoutedFit,
    RoutedLaw,
    saturated_experts,
)
from peerscale.laws.solver import FitStatus

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


def test_intervals_and_json_routed() -> None:
    result = fitted_routed(routed_runs(noise=0.003), bootstrap=200)
    for name in ("a", "b", "c", "d"):
        assert result.ci[name][0] < getattr(result, name) < result.ci[name][1]
    low, high = result.interval(lambda law: law.effective_params(1.3e9, 64))
    assert low < result.effective_params(1.3e9, 64) < high
    stored = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    keys = {"law", "n", "status", "objective_name", "objective_value", "ci", "rms_log10", *ROUTED_NAMES}
    assert keys <= stored.keys()


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


def test_intervals_and_json_granular() -> None:
    result = fitted_granular(granular_runs(noise=0.005), bootstrap=100)
    low, high = result.interval(lambda law: law.predict(4.3e9, 1e11, 16))
    assert low < GRANULAR.predict(4.3e9, 1e11, 16) < high and high - low < 0.03
    stored = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert {"law", "n", "status", "objective_name", "objective_value", "ci", *GRANULAR_NAMES} <= stored.keys()
    assert stored["ci"].keys() == set(GRANULAR_NAMES)


def test_too_few_rows() -> None:
    with pytest.raises(UserError, match=r"6 rows are too few .* 7 coefficients"):
        fitted_granular(granular_runs().head(6))


PEER = {
    "active": PeerLaw(E=1.6, A=300.0, B=500.0, alpha=0.3, beta=0.28),
    "experts": PeerLaw(E=1.6, A=300.0, B=500.0, alpha=0.3, beta=0.28, chi=0.06),
    "granularity": PeerLaw(E=1.6, A=300.0, B=500.0, alpha=0.3, beta=0.28, gamma=-0.05),
    "product": PeerLaw(E=1.6, A=500.0, B=500.0, alpha=0.3, beta=0.28, chi=0.06, gamma=0.04),
    "memory": PeerLaw(E=1.4, A=300.0, B=500.0, alpha=0.3, beta=0.28, H=20.0, eta=0.25, theta=0.2),
}


def peer_runs(law: PeerLaw, noise: float = 0.0) -> pd.DataFrame:
    rows = [
        (n, d, x, g)
        for n in (1e7, 5e7, 2.5e8)
        for d in (2e8, 2e9, 2e10)
        for x in (1024, 16384, 262144)
        for g in (16, 64, 256)
    ]
    table = pd.DataFrame(rows, columns=["N", "D", "X", "G"])
    scatter = np.exp(noise * np.random.default_rng(0).standard_normal(len(table)))
    return table.assign(loss=law.predict(table["N"], table["D"], table["X"], table["G"]) * scatter)


def fitted_peer(table: pd.DataFrame, **options) -> PeerFit:
    return fit_peer(table, params="N", tokens="D", experts="X", granularity="G", loss="loss", **options)


def test_the_law_written_out() -> None:
    law = PeerLaw(E=1.0, A=2.0, B=3.0, alpha=0.1, beta=0.2, chi=0.3, gamma=0.4, H=5.0, eta=0.6, theta=0.7)
    expected = 1 + 2 / (7**0.1 * 11**0.3 * 13**0.4) + 5 / (11**0.6 * 13**0.7) + 3 / 17**0.2
    assert law.predict(7, 17, 11, 13) == pytest.approx(expected)


@pytest.mark.parametrize("form", list(FORMS))
def test_chooses_the_form_that_made_the_data(form: str) -> None:
    result = fitted_peer(peer_runs(PEER[form], noise=0.002), objective="mse-log")
    assert result.chosen == form and result.status is FitStatus.CONVERGED
    assert {candidate.form for candidate in result.candidates} == FORMS.keys()
    errors = [candidate.error for candidate in result.candidates]
    assert errors == sorted(errors) and errors[0] < 0.02 and (form == "active" or errors[-1] > 1.5 * errors[0])
    assert result.predict(1e9, 5e10, 1e6, 256) == pytest.approx(PEER[form].predict(1e9, 5e10, 1e6, 256), abs=0.02)
    assert result.hold_out.n == 9


def test_recovers_coefficients_without_noise() -> None:
    result, truth = fitted_peer(peer_runs(PEER["product"])), PEER["product"]
    for name in ("E", "A", "B", "alpha", "beta", "chi", "gamma"):
        assert getattr(result, name) == pytest.approx(getattr(truth, name), rel=1e-3), name
    assert (result.H, result.eta, result.theta) == (0, 0, 0)


def test_intervals_and_json_peer() -> None:
    result = fitted_peer(peer_runs(PEER["experts"], noise=0.002), bootstrap=50)
    low, high = result.interval(lambda law: law.predict(1e9, 5e10, 1e6, 256))
    assert low < result.predict(1e9, 5e10, 1e6, 256) < high and "chi" in result.ci and "eta" not in result.ci
    stored = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert stored["chosen"] == "experts" and len(stored["candidates"]) == 5
    assert stored["candidates"][0]["held_out"].keys() == {"budget", "experts", "granularity"}


def test_an_axis_without_variation_does_not_count_and_too_few_runs_are_refused() -> None:
    result = fitted_peer(peer_runs(PEER["experts"]).query("G == 64"))
    assert result.candidates[0].held_out.keys() == {"budget", "experts"}
    with pytest.raises(UserError, match="6 rows are too few to choose a form"):
        fitted_peer(peer_runs(PEER["experts"]).head(6))
