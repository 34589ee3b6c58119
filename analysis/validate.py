"""Check our fits of published training results against the values that others found in them.

    .venv/bin/python analysis/validate.py DIR

DIR contains chinchilla_epoch_svg.csv, llama3_isoflops_points.csv and clark2022_routed_final.csv: the Chinchilla runs of
Besiroglu et al. 2024 (digitised from Hoffmann et al. 2022, Figure 4), the isoFLOP points of Llama 3 (Llama Team 2024,
Figure 2) and the runs of Clark et al. 2022. The design of Krajewski et al. 2024 is generated here, with losses from
their law. Exit code 1 if any value is outside its tolerance.
"""

import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import huber

from peerscale.api import fit_granular, fit_isoflop, fit_parametric, fit_routed
from peerscale.errors import ArgumentParser, UserError, exit_code
from peerscale.laws.moe import GranularLaw
from peerscale.laws.parametric import Surface
from peerscale.records.table import read_table

SURFACE = ("E", "A", "B", "alpha", "beta")


@dataclass(frozen=True, slots=True)
class Check:
    """One value, which should equal `expected` (`=`) or be at most that (`<=`), within `tolerance`, or above (`>`)."""

    what: str
    value: float
    expected: float
    tolerance: float = 0.0
    sign: str = "="

    @property
    def passed(self) -> bool:
        off = self.value - self.expected
        return {"<=": off <= self.tolerance, ">": off > 0, "=": abs(off) <= self.tolerance}[self.sign]

    def __str__(self) -> str:
        within = f"+-{self.tolerance:.3g}" if self.tolerance else ""
        bound = f"{self.sign:>2} {self.expected:<13.7g} {within}"
        return f"{'pass' if self.passed else 'FAIL'}  {self.what:<52} {self.value:<14.8g} {bound}".rstrip()


def near(name: str, *rows: tuple[str, float, float, float]) -> Iterator[Check]:
    """A check per (what, value, expected, tolerance)."""
    for what, value, expected, tolerance in rows:
        yield Check(f"{name}: {what}", value, expected, tolerance)


def coefficients(name: str, fit: Any, expected: dict[str, tuple[float, float]], **units: float) -> Iterator[Check]:
    """A check per coefficient, expected (value, tolerance); `units`: the units of N in A and of D in B."""
    scale = {"A": units.get("N", 1.0) ** -fit.alpha, "B": units.get("D", 1.0) ** -fit.beta}
    return near(name, *((key, getattr(fit, key) * scale.get(key, 1), *wanted) for key, wanted in expected.items()))


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(
        prog=".venv/bin/python analysis/validate.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    folder = parser.parse_args(argv).folder
    checks = [*chinchilla(folder), *llama(folder), *clark(folder), *krajewski()]
    print(*checks, sep="\n")
    failed = sum(not check.passed for check in checks)
    print(f"{len(checks) - failed} of {len(checks)} values pass")
    return int(failed > 0)


def read(folder: Path, name: str, *columns: str) -> pd.DataFrame:
    if not (folder / name).is_file():
        raise UserError(f"no {name} in {folder}")
    return read_table(folder / name, columns)


def surface(table: pd.DataFrame, **options: Any) -> Any:
    return fit_parametric(table, params="N", tokens="D", loss="loss", **options)


def approach_2(table: pd.DataFrame, budget: str, x: str) -> Any:
    """Approach 2 as published, including flagged optima."""
    return fit_isoflop(table, budget=budget, x=x, loss="loss", include_flagged=True)


def chinchilla(folder: Path) -> Iterator[Check]:
    """E1 to E9: approaches 2 and 3 on the digitised runs; the five highest losses are outliers."""
    everything = read(folder, "chinchilla_epoch_svg.csv", "Model Size", "Training FLOP", "loss").rename(
        columns={"Model Size": "N", "Training FLOP": "C"}
    )
    everything["D"] = everything["C"] / (6 * everything["N"])
    runs = everything.nsmallest(240, "loss")
    fit = surface(runs, bootstrap=4000)
    bound = 0.00101828
    yield Check("Chinchilla E1 huber-log, 240 runs: objective", fit.objective_value, bound, sign="<=")
    published = Surface(
        E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658
    )  # from an optimiser that stopped early
    residuals = np.log(published.predict(runs["N"], runs["D"]) / runs["loss"])
    theirs = float(np.sum(huber(1e-3, residuals)))
    yield Check("Chinchilla E1 published headline is worse", theirs, bound, sign=">")
    expected = {
        "alpha": (0.34731, 5e-4), "beta": (0.36717, 5e-4), "E": (1.8172, 5e-4),
        "A": (477.83, 4.78), "B": (2143.4, 32.2), "a": (0.5139, 1e-3),
    }  # fmt: skip
    yield from coefficients("Chinchilla E1", fit, expected)
    expected = {
        "alpha": (0.3493, 1e-3), "beta": (0.4531, 1e-3), "E": (1.8913, 1e-3), "A": (495.7, 5), "B": (12846, 385),
    }  # fmt: skip
    outliers = surface(everything)
    yield from coefficients("Chinchilla E2 all 245 runs", outliers, expected)
    yield Check("Chinchilla E2 objective", outliers.objective_value, 0.00182601, 1e-8, "<=")

    small, large = runs[runs["C"] < 1e21], runs[runs["C"] >= 1e21]
    for name, objective, values in (
        ("E3 squared loss", "mse", (1.9051, 4.0005, 1.0509, 0.3511, 0.4587)),
        ("E4 huber", "huber", (1.8250, 3.6986, 1.0396, 0.3239, 0.4058)),
        ("E5 squared log loss", "mse-log", (1.8926, 4.0146, 1.0571, 0.3522, 0.4430)),
    ):
        part = surface(small, objective=objective)
        expected = {key: (value, 5e-4) for key, value in zip(SURFACE, values, strict=True)}
        yield from coefficients(f"Chinchilla {name}, 217 runs", part, expected, N=1e6, D=1e9)
        if objective == "mse":
            yield Check("Chinchilla E3 residual sum of squares", part.objective_value, 0.062414, 1e-6)

    for name, expected_error, tolerance in (("alpha", 0.0154, 0.002), ("beta", 0.0206, 0.003), ("E", 0.0257, 0.003)):
        error = float(np.std(fit.bootstrap.draws[name], ddof=1))
        yield Check(f"Chinchilla E6 bootstrap standard error: {name}", error, expected_error, tolerance)

    budgets = np.array([6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21, 3e21])
    nearest = budgets[np.abs(np.log(everything["C"].to_numpy()[:, None] / budgets)).argmin(axis=1)]
    snapped = everything.assign(budget=nearest, off=np.abs(everything["C"] / nearest - 1), size=everything["N"].round())
    snapped = snapped[snapped["off"] <= 0.1]
    yield Check("Chinchilla E7 runs within 10 % of a budget", len(snapped), 129)
    snapped = snapped.sort_values("off", kind="stable").drop_duplicates(["size", "budget"])
    yield Check("Chinchilla E7 runs, one per size and budget", len(snapped), 123)
    fitted = approach_2(snapped, "budget", "N")
    yield from near(
        "Chinchilla E7 approach 2",
        ("a", fitted.exponent, 0.4951, 3e-3), ("b", 1 - fitted.exponent, 0.5049, 3e-3),
        ("coefficient", fitted.coefficient, 0.1038, 0.001),
    )  # fmt: skip
    flagged = [optimum.budget for optimum in fitted.vertices if optimum.status == "outside_range"]
    yield Check("Chinchilla E7 the optimum outside its range", flagged[0] if len(flagged) == 1 else np.nan, 1e20)

    part = surface(small)
    expected = {"E": (1.8205, 5e-4), "alpha": (0.32713, 5e-4), "beta": (0.39609, 5e-4)}
    yield from coefficients("Chinchilla E8 fitted below 1e21 FLOPs", part, expected)
    off = part.predict(large["N"], large["D"]) - large["loss"]
    yield Check("Chinchilla E8 held-out runs", len(large), 23)
    yield Check("Chinchilla E8 held-out RMSE", float(np.sqrt(np.mean(off**2))), 0.02823, 2e-4)
    yield Check("Chinchilla E8 held-out MAPE in %", float(100 * np.mean(np.abs(off / large["loss"]))), 1.051, 0.01)

    best = fit.optimum(5.76e23)
    yield from near(
        "Chinchilla E9 optimum at 5.76e23 FLOPs",
        ("N", best.params, 7.319e10, 7.3e8), ("D", best.tokens, 1.3116e12, 1.3e10),
        ("D/N", best.tokens / best.params, 17.92, 0.36), ("loss", best.loss, 1.97391, 1e-3),
    )  # fmt: skip


def llama(folder: Path) -> Iterator[Check]:
    """Approach 2 in tokens, extrapolated as in the paper; approach 3 by least squares; a fit to the smaller budgets."""
    columns = {"compute_budget": "C", "training_tokens": "D", "validation_loss": "loss"}
    points = read(folder, "llama3_isoflops_points.csv", *columns).rename(columns=columns)
    points["N"] = points["C"] / (6 * points["D"])
    fitted = approach_2(points, "C", "D")
    tokens = float(fitted.optimum(3.8e25))
    yield from near(
        "Llama 3 approach 2",
        ("exponent", fitted.exponent, 0.5368, 5e-4), ("coefficient", fitted.coefficient, 0.2994, 3e-3),
        ("D* at 3.8e25 FLOPs", tokens, 1.610e13, 1.6e11),
        ("N* at 3.8e25 FLOPs", 3.8e25 / (6 * tokens), 3.933e11, 3.9e9),
    )  # fmt: skip
    fit = surface(points, objective="mse")
    expected = {
        "alpha": (0.3100, 5e-4), "beta": (0.3136, 5e-4), "E": (0.6047, 5e-4), "A": (59.14, 0.6), "B": (155.1, 1.6),
    }  # fmt: skip
    yield from coefficients("Llama 3 squared loss", fit, expected)
    yield Check("Llama 3 residual sum of squares", fit.objective_value, 0.0020197, 1e-7)
    small = approach_2(points[points["C"] <= 1e21], "C", "D")
    yield from near(
        "Llama 3 budgets up to 1e21",
        ("exponent", small.exponent, 0.4993, 5e-4), ("coefficient", small.coefficient, 1.6277, 0.016),
        ("D* at 1e22", float(small.optimum(1e22)), 1.575e11, 1.6e9),
    )  # fmt: skip
    yield Check("Llama 3 observed D* at 1e22", fitted.vertices[-1].x, 2.382e11, 2.4e9)


def clark(folder: Path) -> Iterator[Check]:
    """One fit per router, each with the five dense models."""
    columns = ("k", "routing_frequency", "seed", "router_type", "flop_increase", "dense_parameter_count", "num_experts")
    runs = read(folder, "clark2022_routed_final.csv", *columns, "loss_validation")
    runs = runs[(runs["k"] == 1) & (runs["routing_frequency"] == 0.5) & (runs["seed"] == 42)]
    dense = runs[(runs["router_type"] == "Dense") & (runs["flop_increase"] == 1)]
    for router, n, rms, values in (
        ("S-Base", 58, 0.00330, (-0.0830, -0.1180, 0.0099, 1.1136, 2.075, 238.7)),
        ("RL-R", 59, 0.00330, (-0.0827, -0.1234, 0.0112, 1.1070, 1.722, 470.1)),
        ("Hash", 56, 0.00305, (-0.0874, -0.1384, 0.0126, 1.1595, 4.269, 427.3)),
    ):
        table = pd.concat([runs[runs["router_type"] == router], dense])
        fit = fit_routed(table, dense_params="dense_parameter_count", experts="num_experts", loss="loss_validation")
        yield Check(f"Clark {router}: runs", fit.n, n)
        yield Check(f"Clark {router}: rms of log10 loss", fit.rms_log10, rms, sign="<=")
        tolerances = (0.001, 0.003, 0.0005, 0.01, 0.15 * values[4], 0.15 * values[5])
        names = ("a", "b", "c", "d", "E_start", "E_max")
        for name, value, tolerance in zip(names, values, tolerances, strict=True):
            yield Check(f"Clark {router}: {name}", getattr(fit, name), value, tolerance)
    slope, intercept = np.polyfit(np.log10(dense["dense_parameter_count"]), np.log10(dense["loss_validation"]), 1)
    n_c = float(10 ** (-intercept / slope))
    yield from near("Clark dense models", ("alpha_N", float(-slope), 0.0785, 1e-4), ("N_c", n_c, 3.69e13, 1e11))


def krajewski() -> Iterator[Check]:
    """Their design and law for 64 experts: exact coefficients without noise, only predictions with their scatter."""
    runs, law = granular_design()
    yield from near(
        "Krajewski design",
        ("runs", len(runs), 78, 0), ("smallest N", runs["N"].min(), 135266304, 0),
        ("largest N", runs["N"].max(), 3652190208, 0), ("smallest loss", runs["loss"].min(), 2.859098, 1e-6),
        ("largest loss", runs["loss"].max(), 3.789626, 1e-6),
        ("FLOPs of the first run", runs["F"].iloc[0], 3.16669952e17, 1e9),
        ("loss of the first run", runs["loss"].iloc[0], 3.789626, 1e-6),
    )  # fmt: skip

    def fit(loss: Any) -> Any:
        return fit_granular(runs.assign(loss=loss), params="N", tokens="D", granularity="G", loss="loss")

    exact = fit(runs["loss"])
    for name in ("a", "alpha", "b", "beta", "g", "gamma", "c"):
        truth = getattr(law, name)
        yield Check(f"Krajewski without noise: {name}", getattr(exact, name), truth, 1e-4 * truth)
    errors, extrapolated = [], []
    for seed in range(20):
        noisy = fit(runs["loss"].to_numpy() + 0.015 * np.random.default_rng(seed).standard_normal(len(runs)))
        errors.append(np.sqrt(np.mean((noisy.predict(runs["N"], runs["D"], runs["G"]) - runs["loss"]) ** 2)))
        extrapolated.append(noisy.predict(4.3e9, 1e11, 16))
    yield Check("Krajewski noise .015: RMSE from truth, median", float(np.median(errors)), 0.0043, 0.001)
    spread = float(np.subtract(*np.percentile(extrapolated, [75, 25])))
    # The published spread comes from one set of 20 seeds; over such sets ours ranges from .007 to .014.
    yield Check("Krajewski noise .015: spread of an extrapolation", spread, 0.007, 0.007, "<=")


def granular_design() -> tuple[pd.DataFrame, GranularLaw]:
    """The runs with 64 experts ((d_model, blocks) x tokens in 1e9 x granularity) and the law of their losses."""
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
    runs["F"] = (72 * runs["d_model"] ** 2 + 14 * 64 * runs["d_model"] * runs["G"]) * runs["D"] * runs["blocks"]
    law = GranularLaw(a=18.1, alpha=0.115, b=30.8, beta=0.147, g=2.1, gamma=0.58, c=0.47)
    loss: Any = law.predict(runs["N"], runs["D"], runs["G"])
    runs["loss"] = loss
    return runs, law


if __name__ == "__main__":
    sys.exit(exit_code(main))
