"""The laws of a study, each method by itself: isoFLOP fits, the loss surface, the envelope of the training curves."""

from dataclasses import fields
from typing import Any

import pandas as pd

from peerscale.laws import fit_envelope, fit_isoflop, fit_parametric
from peerscale.laws.fit import Fit
from peerscale.laws.isoflop import IsoflopFit
from peerscale.laws.parametric import Surface
from peerscale.laws.power_law import MIN_BUDGETS
from peerscale.runs.study import SIZE_COLUMNS, method_names, usable

RESAMPLES = 1000
"""Of every bootstrap."""

WITHIN = 0.04
"""A parabola goes through the sizes whose loss is at most this share above the lowest of their budget: where models
see a few hundred steps, the widest lie 0.2 to 0.3 nats above the optimum, on no parabola with the others."""

MIN_SIZES = 3
"""For an envelope: one size between a smaller and a larger."""


def isoflop_fits(runs: pd.DataFrame, x: str, *, bootstrap: int = 0) -> dict[str, IsoflopFit]:
    """The isoFLOP fit of each method's finished runs over the column `x`, by name."""
    settings: dict[str, Any] = {"budget": "budget", "x": x, "loss": "val_loss", "within": WITHIN}
    return {name: fit_isoflop(rows, **settings, bootstrap=bootstrap) for name, rows in _by_method(runs).items()}


def fit_study(runs: pd.DataFrame, curves: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """All laws that a study's tables can feed, in plain values for JSON.

    Args:
        runs: the study's table.
        curves: its training curves; cell, flops and loss of logged steps.

    Returns:
        `{name: fit}`: `<method>` is the isoFLOP fit over FLOPs per token, `<method>/<column>` over another meaning of
        size, `<method>/envelope` the sizes on the lower envelope of the curves and, from three budgets on,
        `<method>/parametric` the loss surface over tokens D and N = FLOPs per token / 6, with which C = 6 N D is
        exact. Each names its `method` and what it is of; a method's three exponents are of one and the same size.
    """
    fits: dict[str, dict[str, Any]] = {}

    def add(key: str, name: str, fit: Fit, **columns: str) -> None:
        fits[key] = {**fit.to_dict(), "method": name, **columns}

    for x in SIZE_COLUMNS:
        for name, fit in isoflop_fits(runs, x, bootstrap=RESAMPLES).items():
            add(name if x == SIZE_COLUMNS[0] else f"{name}/{x}", name, fit, x=x, loss="val_loss")
    for name, rows in _by_method(runs).items():
        if rows["budget"].nunique() >= MIN_BUDGETS and len(rows) > len(fields(Surface)):
            columns = {"params": "flops_per_token / 6", "tokens": "tokens", "loss": "val_loss"}
            sized = rows.assign(**{columns["params"]: rows["flops_per_token"] / 6})
            surface = fit_parametric(sized, **columns, budget="budget", bootstrap=RESAMPLES)
            add(f"{name}/parametric", name, surface, **columns)
        if rows["flops_per_token"].nunique() >= MIN_SIZES:
            logged = curves.merge(rows[["cell", "flops_per_token"]], on="cell")
            columns = {"run": "cell", "flops": "flops", "x": "flops_per_token", "loss": "loss"}
            if logged["cell"].nunique() > 1:
                add(f"{name}/envelope", name, fit_envelope(logged, **columns, bootstrap=RESAMPLES), **columns)
    return fits


def _by_method(runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    named = runs.assign(name=method_names(runs))[usable(runs)]
    return {str(name): rows for name, rows in named.groupby("name", sort=False)}
