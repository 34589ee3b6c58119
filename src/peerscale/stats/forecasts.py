"""Forecasts for a larger budget from the smaller budgets of a study, written before the cells of that budget run.

With at least three budgets, for each method, a straight line in log10 C (`laws.trend`) is fitted to

- the logarithm of the loss at the compute optimum minus an irreducible loss. Three budgets do not determine the
  irreducible loss; it is assumed to be between zero and half of the lowest observed loss. The interval extends from the
  lower end for zero to the upper end for half, and the value is the mean of the two forecasts;
- the difference between that loss and dense's;
- the logarithm of the compute multiplier over dense.

Each quantity has its own line, so a forecast difference only approximately equals the difference of two forecast
losses. All budgets are evaluated on the same validation sequences. Sampling these shifts all losses in the same way, so
it is not an error of a forecast of losses on the same sequences.
"""

import math
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import t as student

from peerscale.errors import UserError
from peerscale.files import from_checkout, write_json
from peerscale.laws.fitting import LEVEL, to_plain
from peerscale.plan.cell_names import budget_name
from peerscale.records.machine import git_commit
from peerscale.records.record import Status
from peerscale.records.study import (
    Study,
    batches,
    collected,
    find_study,
    is_dense,
    method_names,
    published,
    read_fits,
    read_json,
    usable,
    without_brackets,
)  # fmt: skip
from peerscale.records.table import read_records, read_runs
from peerscale.stats.trend import MIN_POINTS, extrapolate

IRREDUCIBLE = 0.5
"""The largest irreducible loss that a forecast allows for, as a share of the lowest observed loss."""

KEY = ["quantity", "method", "reference"]
"""What identifies a forecast. A quantity is the `loss` at the compute optimum or its `difference` to dense's, in nats
per token, or the compute `multiplier` over dense."""

POINT = ["budget", "value", "se", "df"]
"""A quantity at one of the smaller budgets, its standard error, and the degrees of freedom of the budget's fit."""


class Observation(NamedTuple):
    """The observed value of a forecast quantity, with its 95 % interval if that is known."""

    value: float
    low: float | None
    high: float | None


def make_forecast(sweep: str, budget: float, runs: Path, results: Path) -> tuple[dict[str, Any], Path]:
    """Forecast the optima of `budget` from the collected smaller budgets; write the forecast to the published study.

    Returns:
        The forecast and its file.

    Raises:
        UserError: this forecast exists already, cells of this budget or a larger one have finished, or there are too
            few smaller budgets.
    """
    path = published(sweep, results).forecast(budget)
    name = budget_name(budget)
    if path.exists():
        raise UserError(f"{from_checkout(path)} is there already: a forecast is made once, and is not replaced")
    if cells := finished_cells(sweep, budget, runs, results):
        raise UserError(
            f"{len(cells)} cells of {sweep} at {name} FLOPs or more have finished, such as {cells[0]}: a forecast is "
            f"made before any of them has"
        )
    study = find_study(sweep, runs, results)
    fits = read_fits(study.fits)
    found = forecast(fits, budget)
    if not found:
        smaller = ", ".join(budget_name(e["budget"]) for e in fits["budgets"] if e["budget"] < budget) or "none"
        raise UserError(
            f"no method of {sweep} has an optimum with an error at {MIN_POINTS} budgets below {name} FLOPs, as a "
            f"forecast needs; budgets with finished cells: {smaller}"
        )
    used = {point["budget"] for one in found for point in one["points"]}
    runs_table = read_runs(study.runs)
    counts = fitted_cells(runs_table, fits)
    made = {
        "sweep": sweep, "budget": budget, "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(), "from": [{"budget": b, "cells": counts[b]} for b in sorted(used)],
        "leaves_out": left_out(fits, runs_table, used), "forecasts": found,
    }  # fmt: skip
    write_json(path, made)
    return made, path


def finished_cells(sweep: str, budget: float, runs: Path, results: Path) -> list[str]:
    """Finished cells of `budget` or more, collected, not yet collected, or published."""
    tables = [read_runs(s.runs) for s in (collected(sweep, runs), published(sweep, results)) if s.runs.is_file()]
    found = {r.cell for r in read_records(runs / sweep) if r.status is Status.DONE and r.budget >= budget}
    for table in tables:
        found |= {*table.loc[(table["status"] == str(Status.DONE)) & (table["budget"] >= budget), "cell"]}
    return sorted(found)


def fitted_cells(runs: pd.DataFrame, fits: Mapping[str, Any]) -> dict[float, int]:
    """Number of cells in the fit of each budget."""
    runs = without_brackets(runs)
    done = runs.assign(name=method_names(runs))[usable(runs)]
    sizes = {(e["budget"], m["name"]): m["sizes"] for e in fits["budgets"] for m in e["methods"]}
    rows = zip(done["budget"], done["name"], done["flops_per_token"], strict=True)
    taken = [budget for budget, name, x in rows if x in sizes.get((budget, name), ())]
    return {e["budget"]: taken.count(e["budget"]) for e in fits["budgets"]}


def forecast(fits: Mapping[str, Any], budget: float) -> list[dict[str, Any]]:
    """Forecasts of every quantity that a method has, with an error, at three or more budgets below `budget` FLOPs.

    Args:
        fits: the study's `fits.json`; budgets of at least `budget`, or below its `trend_from`, are not used.

    Returns:
        Plain values for JSON: `method`, `quantity`, `reference` (empty for a loss), the forecast `value` with its
        95 % interval `low` to `high`, the `misfit` of the line, and the `points` that it was fitted to (`POINT`).
    """
    smaller = [one for one in _quantities(fits) if fits.get("trend_from", 0.0) <= one["budget"] < budget]
    points = pd.DataFrame([{**one, "se": _se(one)} for one in smaller], columns=[*KEY, *POINT])
    points = points[points["se"] > 0]
    points = points[points.groupby(KEY)["budget"].transform("size") >= MIN_POINTS]
    lowest = points.loc[points["quantity"] == "loss", "value"].min()
    found = []
    for (quantity, method, reference), rows in points.groupby(KEY, sort=False):
        budgets, y, se, df = rows[POINT].to_numpy(float).T
        x, at = np.log10(budgets), math.log10(budget)
        if quantity == "difference":
            line = extrapolate(x, y, se, df, at)
            value, (low, high) = line.value, line.interval
        else:
            floors = np.array([0.0, IRREDUCIBLE * lowest] if quantity == "loss" else [0.0])
            lines = [extrapolate(x, np.log(y - floor), se / (y - floor), df, at) for floor in floors]
            ends = floors[:, None] + np.exp([(one.value, *one.interval) for one in lines])
            line, value, low, high = lines[0], ends[:, 0].mean(), ends.min(), ends.max()
        found.append({
            "method": method, "quantity": quantity, "reference": reference, "value": value, "low": low, "high": high,
            "misfit": line.misfit, "points": rows[POINT].to_dict("records"),
        })  # fmt: skip
    return to_plain(found)


def _quantities(fits: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every quantity that has a value, with its budget and, as `df`, the degrees of freedom of the budget's fit."""
    rows = []
    for entry in fits["budgets"]:
        at = {"budget": entry["budget"], "df": entry.get("df", 0)}
        rows += [
            {**one, **at, "quantity": "loss", "method": one["name"], "reference": "", "value": one["loss"]}
            for one in entry["methods"]
        ]
        rows += [{**one, **at, "quantity": "difference"} for one in filter(is_to_dense, entry["differences"])]
    rows += [{**one, "quantity": "multiplier", "value": one["multiplier"]} for one in fits["multipliers"]]
    return [row for row in rows if row.get("value") is not None]


def _se(one: Mapping[str, Any]) -> float:
    """The error of a quantity without that of sampling sequences, which all budgets share; NaN if it has no error."""
    if one["quantity"] == "multiplier":
        if not one["df"] or one["low"] is None:
            return math.nan
        half = math.log(one["high"] / one["low"]) / 2
        return one["value"] * half / float(student.ppf((1 + LEVEL) / 2, one["df"]))
    return math.nan if one["se"] is None else math.sqrt(max(one["se"] ** 2 - (one["sequences_se"] or 0) ** 2, 0))


def is_to_dense(difference: Mapping[str, Any]) -> bool:
    """Whether a difference of `fits.json` is between a method and dense, at their optima."""
    return difference["size"] == "" and is_dense(difference["reference"])


def left_out(fits: Mapping[str, Any], runs: pd.DataFrame, budgets: Collection[float]) -> list[str]:
    """The sources of error that the intervals of a forecast from these budgets do not include."""
    errors = [one.get("rate_se") for e in fits["budgets"] if e["budget"] in budgets for one in e["methods"]]
    rates = ["the choice of learning rates"] * any(error is None for error in errors)
    changes = [f"the change of the batch ({found})" for found in [batches(runs, budgets)] if found]
    always = ["a bend of a trend in the logarithm of the budget", "the sampling of validation sequences"]
    return [*rates, *changes, *always]


def read_forecasts(study: Study) -> list[dict[str, Any]]:
    """The forecasts in the folder of a published study, by budget; raises `UserError` if a file is not a forecast."""
    keys, found = {"budget", "made", "commit", "from", "leaves_out", "forecasts"}, []
    for path in study.forecasts:
        made = read_json(path)
        if not (isinstance(made, dict) and keys <= made.keys()):
            raise UserError(f"{path}: not a forecast as make forecast writes it")
        found.append(made)
    return sorted(found, key=lambda made: made["budget"])


def observed(made: Mapping[str, Any], fits: Mapping[str, Any]) -> list[tuple[dict[str, Any], Observation | None]]:
    """Each forecast in `made` with the value that was then observed; None if there is no value."""
    known = {
        (one["quantity"], one["method"]): Observation(one["value"], one.get("low"), one.get("high"))
        for one in _quantities(fits) if one["budget"] == made["budget"]
    }  # fmt: skip
    return [(one, known.get((one["quantity"], one["method"]))) for one in made["forecasts"]]


def inside(one: Mapping[str, Any], seen: Observation) -> str:
    """Whether an observation is within the forecast's interval, or at least within the combined error of both.

    The forecast's interval is for the true value, and the observed value has its own error. To combine them, the
    half-widths of the two intervals on the sides that face each other are added in quadrature.
    """
    if one["low"] <= seen.value <= one["high"]:
        return "yes"
    if seen.low is None or seen.high is None:
        return "no"
    off = seen.value - one["value"]
    ends = (one["high"], seen.low) if off > 0 else (one["low"], seen.high)
    within = abs(off) <= math.hypot(ends[0] - one["value"], ends[1] - seen.value)
    return "no, but within both errors" if within else "no"
