"""Fits of published training results, against the values that others found in them.

The folder that PEERSCALE_PUBLISHED_RUNS names has the Chinchilla runs of Besiroglu et al. 2024 (digitised from Hoffmann
et al. 2022, Figure 4), the isoFLOP points of Llama 3 (Llama Team 2024, Figure 2) and the runs of Clark et al. 2022. The
design of Krajewski et al. 2024 is generated here, with losses from their law.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.special import huber

from peerscale.api import fit_granular, fit_isoflop, fit_parametric, fit_routed
from peerscale.laws.isoflop import IsoflopFit
from peerscale.laws.moe import GranularFit, GranularLaw
from peerscale.laws.parametric import ParametricFit, Surface


def published(name: str) -> pd.DataFrame:
    path = Path(os.environ.get("PEERSCALE_PUBLISHED_RUNS", "unset"), name)
    if not path.is_file():
        pytest.skip(f"no {name}: PEERSCALE_PUBLISHED_RUNS names no folder of published runs")
    return pd.read_csv(path)


@pytest.fixture(scope="module")
def chinchilla() -> pd.DataFrame:
    runs = published("chinchilla_epoch_svg.csv").rename(columns={"Model Size": "N", "Training FLOP": "C"})
    return runs.assign(D=runs["C"] / (6 * runs["N"]))


@pytest.fixture(scope="module")
def without_outliers(chinchilla: pd.DataFrame) -> pd.DataFrame:
    return chinchilla.nsmallest(240, "loss")


@pytest.fixture(scope="module")
def llama() -> pd.DataFrame:
    columns = {"compute_budget": "C", "training_tokens": "D", "validation_loss": "loss"}
    points = published("llama3_isoflops_points.csv").rename(columns=columns)
    return points.assign(N=points["C"] / (6 * points["D"]))


@pytest.fixture(scope="module")
def clark() -> pd.DataFrame:
    runs = published("clark2022_routed_final.csv")
    return runs[(runs["k"] == 1) & (runs["routing_frequency"] == 0.5) & (runs["seed"] == 42)]


def surface(table: pd.DataFrame, **options: Any) -> ParametricFit:
    return fit_parametric(table, params="N", tokens="D", loss="loss", **options)


def approach_2(table: pd.DataFrame, budget: str, x: str) -> IsoflopFit:
    """As published, including flagged optima."""
    return fit_isoflop(table, budget=budget, x=x, loss="loss", include_flagged=True)


def agrees(fit: Any, **expected: tuple[float, float]) -> None:
    """Each value of the fit is the expected one, given as (value, tolerance)."""
    for name, (value, tolerance) in expected.items():
        assert getattr(fit, name) == pytest.approx(value, abs=tolerance), name


def test_chinchilla_where_published_code_stopped_early(without_outliers: pd.DataFrame) -> None:
    fit, bound = surface(without_outliers), 0.00101828
    assert fit.objective_value <= bound
    headline = Surface(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)
    off = np.log(headline.predict(without_outliers["N"], without_outliers["D"]) / without_outliers["loss"])
    assert np.sum(huber(1e-3, off)) > bound
    agrees(fit, alpha=(0.34731, 5e-4), beta=(0.36717, 5e-4), E=(1.8172, 5e-4), A=(477.83, 4.78), B=(2143.4, 32.2))
    agrees(fit, a=(0.5139, 1e-3))
    best = fit.optimum(5.76e23)
    agrees(best, params=(7.319e10, 7.3e8), tokens=(1.3116e12, 1.3e10), loss=(1.97391, 1e-3))
    assert best.tokens / best.params == pytest.approx(17.92, abs=0.36)


def test_chinchilla_with_its_outliers(chinchilla: pd.DataFrame) -> None:
    fit = surface(chinchilla)
    agrees(fit, alpha=(0.3493, 1e-3), beta=(0.4531, 1e-3), E=(1.8913, 1e-3), A=(495.7, 5), B=(12846, 385))
    assert fit.objective_value <= 0.00182602


@pytest.mark.parametrize(
    ("objective", "coefficients"),
    [
        ("mse", (1.9051, 4.0005, 1.0509, 0.3511, 0.4587)),
        ("huber", (1.8250, 3.6986, 1.0396, 0.3239, 0.4058)),
        ("mse-log", (1.8926, 4.0146, 1.0571, 0.3522, 0.4430)),
    ],
)
def test_chinchilla_by_other_objectives(
    without_outliers: pd.DataFrame, objective: str, coefficients: tuple[float, ...]
) -> None:
    small = without_outliers[without_outliers["C"] < 1e21]
    fit = surface(small.assign(N=small["N"] / 1e6, D=small["D"] / 1e9), objective=objective)
    agrees(
        fit, **{name: (value, 5e-4) for name, value in zip(("E", "A", "B", "alpha", "beta"), coefficients, strict=True)}
    )
    if objective == "mse":
        assert fit.objective_value == pytest.approx(0.062414, abs=1e-6)


def test_chinchilla_standard_errors(without_outliers: pd.DataFrame) -> None:
    draws = surface(without_outliers, bootstrap=1000).bootstrap.draws
    for name, error, tolerance in (("alpha", 0.0154, 0.002), ("beta", 0.0206, 0.003), ("E", 0.0257, 0.003)):
        assert np.std(draws[name], ddof=1) == pytest.approx(error, abs=tolerance), name


def test_chinchilla_by_approach_2(chinchilla: pd.DataFrame) -> None:
    budgets = np.array([6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21, 3e21])
    nearest = budgets[np.abs(np.log(chinchilla["C"].to_numpy()[:, None] / budgets)).argmin(axis=1)]
    snapped = chinchilla.assign(budget=nearest, off=np.abs(chinchilla["C"] / nearest - 1), size=chinchilla["N"].round())
    snapped = snapped[snapped["off"] <= 0.1]
    assert len(snapped) == 129
    snapped = snapped.sort_values("off", kind="stable").drop_duplicates(["size", "budget"])
    assert len(snapped) == 123
    fit = approach_2(snapped, "budget", "N")
    agrees(fit, exponent=(0.4951, 3e-3), coefficient=(0.1038, 0.001))
    assert [optimum.budget for optimum in fit.vertices if optimum.status == "outside_range"] == [1e20]


def test_chinchilla_largest_runs_predicted(without_outliers: pd.DataFrame) -> None:
    large = without_outliers["C"] >= 1e21
    fit = surface(without_outliers[~large])
    agrees(fit, E=(1.8205, 5e-4), alpha=(0.32713, 5e-4), beta=(0.39609, 5e-4))
    held = surface(without_outliers, budget="C", hold_out=1e21).hold_out
    assert held.n == large.sum() == 23
    agrees(held, rmse=(0.02823, 2e-4), mape=(1.051, 0.01))


def test_llama_3(llama: pd.DataFrame) -> None:
    fit = approach_2(llama, "C", "D")
    agrees(fit, exponent=(0.5368, 5e-4), coefficient=(0.2994, 3e-3))
    tokens = fit.optimum(3.8e25)
    assert tokens == pytest.approx(1.610e13, abs=1.6e11)
    assert 3.8e25 / (6 * tokens) == pytest.approx(3.933e11, abs=3.9e9)
    assert fit.vertices[-1].x == pytest.approx(2.382e11, abs=2.4e9)
    small = approach_2(llama[llama["C"] <= 1e21], "C", "D")
    agrees(small, exponent=(0.4993, 5e-4), coefficient=(1.6277, 0.016))
    assert small.optimum(1e22) == pytest.approx(1.575e11, abs=1.6e9)
    by_surface = surface(llama, objective="mse")
    agrees(by_surface, alpha=(0.31, 5e-4), beta=(0.3136, 5e-4), E=(0.6047, 5e-4), A=(59.14, 0.6), B=(155.1, 1.6))
    assert by_surface.objective_value == pytest.approx(0.0020197, abs=1e-7)


@pytest.mark.parametrize(
    ("router", "n", "rms", "coefficients"),
    [
        ("S-Base", 58, 0.00330, (-0.0830, -0.1180, 0.0099, 1.1136, 2.075, 238.7)),
        ("RL-R", 59, 0.00330, (-0.0827, -0.1234, 0.0112, 1.1070, 1.722, 470.1)),
        ("Hash", 56, 0.00305, (-0.0874, -0.1384, 0.0126, 1.1595, 4.269, 427.3)),
    ],
)
def test_clark(clark: pd.DataFrame, router: str, n: int, rms: float, coefficients: tuple[float, ...]) -> None:
    """One router, with the five dense models."""
    dense = clark[(clark["router_type"] == "Dense") & (clark["flop_increase"] == 1)]
    table = pd.concat([clark[clark["router_type"] == router], dense])
    fit = fit_routed(table, dense_params="dense_parameter_count", experts="num_experts", loss="loss_validation")
    assert fit.n == n and fit.rms_log10 <= rms
    tolerances = (0.001, 0.003, 0.0005, 0.01, 0.15 * coefficients[4], 0.15 * coefficients[5])
    names = ("a", "b", "c", "d", "E_start", "E_max")
    agrees(fit, **dict(zip(names, zip(coefficients, tolerances, strict=True), strict=True)))


KRAJEWSKI = GranularLaw(a=18.1, alpha=0.115, b=30.8, beta=0.147, g=2.1, gamma=0.58, c=0.47)


@pytest.fixture(scope="module")
def krajewski() -> pd.DataFrame:
    """The runs with 64 experts ((d_model, blocks) x tokens in 1e9 x granularity), with losses from their law."""
    every = (1, 2, 4, 8, 16)
    grid = [
        *(((d, 4), tokens, every) for d in (256, 384, 512) for tokens in (16, 33, 66)),
        ((512, 4), 130, (1, 2, 4)),
        ((512, 8), 16, every), ((512, 8), 33, every), ((512, 8), 66, (1, 2, 4, 8)),
        ((640, 10), 16, every), ((640, 10), 33, every), ((640, 10), 66, (1, 2, 4)),
        ((768, 12), 33, (1, 2, 4)),
    ]  # fmt: skip
    rows = [(*model, tokens * 1e9, g) for model, tokens, granularities in grid for g in granularities]
    runs = pd.DataFrame(rows, columns=["d_model", "blocks", "D", "G"])
    runs["N"] = runs["d_model"] ** 2 * (8 * 64 + 4) * runs["blocks"]
    return runs.assign(loss=KRAJEWSKI.predict(runs["N"], runs["D"], runs["G"]))


def granular(runs: pd.DataFrame, noise: np.ndarray | float = 0.0) -> GranularFit:
    table = runs.assign(loss=runs["loss"] + noise)
    return fit_granular(table, params="N", tokens="D", granularity="G", loss="loss")


def test_krajewski_without_noise_exact(krajewski: pd.DataFrame) -> None:
    n, loss = krajewski["N"], krajewski["loss"]
    assert (len(n), n.min(), n.max()) == (78, 135266304, 3652190208)
    assert (loss.min(), loss.max(), loss[0]) == pytest.approx((2.859098, 3.789626, 3.789626), abs=1e-6)
    fit = granular(krajewski)
    agrees(fit, **{name: (value, 1e-4 * value) for name, value in vars(KRAJEWSKI).items()})


def test_krajewski_with_noise_predicts(krajewski: pd.DataFrame) -> None:
    """Only predictions hold with the scatter of their runs, of .015."""
    errors, extrapolated = [], []
    for seed in range(20):
        fit = granular(krajewski, 0.015 * np.random.default_rng(seed).standard_normal(len(krajewski)))
        off = fit.predict(krajewski["N"], krajewski["D"], krajewski["G"]) - krajewski["loss"]
        errors.append(np.sqrt(np.mean(off**2)))
        extrapolated.append(fit.predict(4.3e9, 1e11, 16))
    assert np.median(errors) == pytest.approx(0.0043, abs=0.001)
    # The published spread, .007, comes from one set of 20 seeds; over such sets ours ranges from .007 to .014.
    assert np.subtract(*np.percentile(extrapolated, [75, 25])) <= 0.014
