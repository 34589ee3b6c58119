"""Learning-rate studies: the rates that were tried, each method's best rate by a parabola in ln rate, and its law."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import pandas as pd

from peerscale.errors import UserError
from peerscale.laws import fit_rates as fit_rate_law
from peerscale.laws.optima import OptimaFit
from peerscale.runs.study import axes_of, method_names, same_variant, usable

RATES = ["lr", "table_lr"]

REACH = 2.2
"""A parabola in ln rate is fitted to the rates within this factor of the best rate that was tried."""

MIN_RATES = 3


def settings_table(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per method and setting: name, lr, table_lr (0: none), the losses by size and their mean, best first.

    Other axes of the study are part of the name. `lr` is the rate in the study's file, at the reference width, while
    `runs` has the rate at each cell's width. If the study does not vary the rate, the largest of these is used.

    Raises:
        UserError: no setting was trained at every size.
    """
    cells = with_rates_as_set(runs)
    losses = cells.pivot_table(index=["name", *RATES], columns="size", values="val_loss", aggfunc="mean").dropna()
    if losses.empty:
        raise UserError("no setting was trained at every size yet: run the rest of the study first")
    losses["mean"] = losses.mean(axis=1)
    return losses.reset_index().sort_values(["name", "mean"])


def with_rates_as_set(runs: pd.DataFrame) -> pd.DataFrame:
    """The finished runs, with `name` without rates, and with the rates as set in the study's file."""
    as_set = axes_of(runs).map(lambda axes: axes.get("optim.lr", np.nan)).astype(float)
    names = method_names(runs, without=("optim.lr", "optim.table_lr"))
    runs = runs.assign(name=names)[usable(runs)]
    runs["lr"] = as_set[runs.index].fillna(runs.groupby("name")["lr"].transform("max"))
    runs["table_lr"] = runs["table_lr"].fillna(0.0)
    return runs


def fit_rates(runs: pd.DataFrame) -> dict[str, list[dict[str, Any]]]:
    """The best rate of each method and size, from one fit per budget with a shared curvature in ln rate.

    Each rate is combined with its best table rate. The error includes the misfit of the parabolas; it does not include
    seeds if a single seed tried every rate.

    Returns:
        `best`: budget, size, method, rate with its interval, loss there, status, and the best rate tried with its loss.
        `differences`: between methods at one size, each at its best rate. Both are empty if fewer than three rates were
        tried.
    """
    best: list[dict[str, Any]] = []
    differences: list[dict[str, Any]] = []
    for budget, cells in with_rates_as_set(runs).groupby("budget"):
        cells = cells.groupby(["size", "name", "lr", "seed"], as_index=False, sort=False)["val_loss"].min()
        curve = cells["size"] + " " + cells["name"]
        mean = cells.groupby([curve, "lr"])["val_loss"].transform("mean")
        lowest = cells.loc[mean.groupby(curve).transform("idxmin"), "lr"].to_numpy()
        near = np.abs(np.log(cells["lr"] / lowest)) < np.log(REACH)
        if cells[near].groupby(curve)["lr"].nunique().max() < MIN_RATES:
            continue
        tried, losses = cells.loc[near, "lr"].to_numpy(float), cells.loc[near, "val_loss"].to_numpy(float)
        fit = OptimaFit.of(curve[near].tolist(), tried, losses, at_least=MIN_RATES)
        optima = {key: fit.optimum(key) for key in fit.names}
        for key, found in optima.items():
            size, _, name = key.partition(" ")
            row = mean[curve == key].idxmin()
            best.append({
                "budget": budget, "size": size, "method": name, "status": found.status, "rate": found.x,
                "rate_interval": found.x_interval, "loss": found.loss, "se": fit.estimate(found.weights).se,
                "best_tried": {"rate": cells.loc[row, "lr"], "loss": mean[row]},
            })  # fmt: skip
            names = [other.partition(" ")[2] for other in optima if other.startswith(f"{size} ")]
            dense = same_variant("dense", name, names)
            reference = optima.get(f"{size} {dense}")
            if not name.startswith("dense") and reference and found.status.has_number and reference.status.has_number:
                estimate = fit.estimate(found.weights - reference.weights)
                low, high = estimate.interval
                differences.append({
                    "budget": budget, "size": size, "method": name, "reference": dense, "value": estimate.value,
                    "se": estimate.se, "df": estimate.df, "low": low, "high": high,
                    "leaves_out": "seeds" if not fit.seeds_df else "",
                })  # fmt: skip
    return {"best": best, "differences": differences}


def wants_law(runs: pd.DataFrame) -> bool:
    """Whether a study is planned to try rates at several widths and several budgets."""
    if not {"d_model", "tokens", "batch_sequences"} <= {*runs}:
        return False
    tried = runs[axes_of(runs).map(lambda axes: "optim.lr" in axes)]
    return min(tried["d_model"].nunique(), tried["budget"].nunique()) > 1


def names_under_law(runs: pd.DataFrame) -> pd.Series:
    """Names of the methods, without the axes that are variables of the law or that separate its curves."""
    return method_names(runs, without=("optim.lr", "optim.table_lr", "batch_sequences"))


def fit_law(runs: pd.DataFrame, held_out: Collection[str] = ()) -> dict[str, Any] | None:
    """The law of the best rate in width, tokens and, if it varies, batch; per method, with shared exponents.

    Args:
        runs: the study's table.
        held_out: names of the sizes that test the law and that it is not fitted to.

    Returns:
        `laws.rates.RateFit.to_dict()`; None if the study does not try rates at several widths and budgets, or the
        finished runs do not determine a law.
    """
    if not wants_law(runs):
        return None
    cells = runs.assign(name=names_under_law(runs), table_lr=runs["table_lr"].fillna(0.0))[usable(runs)]
    fitted = cells[~cells["size"].isin(held_out)]
    if fitted.empty:
        return None
    batch = "batch_sequences" if fitted["batch_sequences"].nunique() > 1 else None
    out = cells["size"].isin(held_out) if held_out else None
    try:
        return fit_rate_law(
            cells, loss="val_loss", width="d_model", tokens="tokens", batch=batch, by="name",
            curve=("budget", "table_lr", "seed"), hold_out=out,
        ).to_dict()  # fmt: skip
    except UserError:
        return None


ASSUMED_BATCH_EXPONENT = 0.5
"""For a law from runs with one batch size: Adam's best rate grows roughly as the square root of the batch size (Malladi
et al. 2022)."""

VARIABLES = {"width": ("d_model", "a"), "tokens": ("tokens", "b"), "batch": ("batch_sequences", "c")}
"""Variables of the law: their names in `optim.lr_law`, and their exponents."""


def as_configuration(law: Mapping[str, Any], runs: pd.DataFrame) -> dict[str, Any]:
    """A law as settings for conf/: coefficients to three digits, and the range of the runs.

    Args:
        law: `RateFit.to_dict()` of a study's runs.
        runs: the study's table, which has the batch and the largest rate that were tried.

    Returns:
        `optim`: lr_rule and lr_law for all layers, with the shared exponents; `methods`: the lr of each method, and its
        exponents if they are not shared.
    """
    shared, done = next(iter(law["groups"].values()))["shared"], runs[usable(runs)]
    usual = float(done["batch_sequences"].mode().iloc[0])
    lr_law: dict[str, Any] = {}
    for name, (key, exponent) in VARIABLES.items():
        is_fitted = name in law["fitted"]
        lr_law[f"reference_{key}"] = shared[f"{name}_0"] if is_fitted else usual
        lr_law[f"{name}_exponent"] = shared[exponent] if is_fitted else ASSUMED_BATCH_EXPONENT
        lr_law[f"fitted_{key}"] = [*law["fitted"][name]] if is_fitted else [usual, usual]
    lr_law["fewest_steps"] = int(done["steps"].min())
    lr_law["largest_lr"] = float(done["lr"].max())
    methods: dict[str, dict[str, Any]] = {}
    for method, found in law["groups"].items():
        methods[method] = {"lr": _rounded(found["m"])}
        if law["exponents"] == "own":
            exponents = {f"{name}_exponent": _rounded(found[VARIABLES[name][1]]) for name in law["fitted"]}
            methods[method]["lr_law"] = exponents
    exact = ("fitted", "fewest")
    rounded = {key: value if key.startswith(exact) else _rounded(value) for key, value in lr_law.items()}
    return {"optim": {"lr_rule": "law", "lr_law": rounded}, "methods": methods}


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")
