"""A study's `fits.json`: everything that is computed once from its tables."""

from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd

from peerscale.errors import UserError
from peerscale.laws.fitting import to_plain
from peerscale.laws.isoflop import MIN_BUDGETS
from peerscale.laws.parametric import Surface, fit_parametric
from peerscale.records.study import read_json
from peerscale.stats.conventions import multipliers_by_convention
from peerscale.stats.curve import described_curves, finished, from_names, to_names, without_brackets
from peerscale.stats.guests import without_guests
from peerscale.stats.rates import curves_of_law, fit_law
from peerscale.stats.table_rates import table_law_of

RESAMPLES = 1000
"""Number of resamples of every bootstrap of a law."""


def fit_study(runs: pd.DataFrame, compared: Mapping[str, Any], held_out: Collection[int] = ()) -> dict[str, Any]:
    """Statistics and laws of a study as plain values for JSON.

    Args:
        runs: the study's table; laws and conventions do not use its rate brackets, nor laws of rates its guests.
        compared: the result of `comparison.compare`.
        held_out: widths (d_model) that a law of learning rates is not fitted to.

    Returns:
        `compared`, and also
        `laws`, with at least three budgets: `<method>`, the power law of optimal sizes, and `<method>/parametric`, the
        loss surface over tokens D and N = FLOPs per token / 6, so that C = 6 N D is exact. Both exponents of a method
        refer to the same measure of size.
        `conventions`: multipliers under other FLOP conventions.
        `rates`: `law`, of the best rates of a study that varies them (None: too few runs), besides the `rates` of
        `compared`: `brackets` of the usual rates and the errors from them. `tables`: the law of the best table rate of
        a study that varies that rate alone.
    """
    done, baseline, trend_from = finished(runs), compared["baseline"], compared.get("trend_from", 0.0)
    own = without_guests(runs, compared.get("guests", ()))
    conventions = multipliers_by_convention(done, from_names(compared)["budgets"], baseline, trend_from)
    law = fit_law(without_brackets(own), held_out)
    return {
        **compared,
        "curves": compared["curves"] | described_curves(curves_of_law(own) if law else ()),
        "laws": compared["laws"] | surfaces(done),
        "conventions": to_plain(to_names(conventions)),
        "rates": {"law": to_plain(law), "tables": None if law else table_law_of(finished(own))}
        | compared.get("rates", {}),
    }


def surfaces(done: pd.DataFrame) -> dict[str, Any]:
    """The loss surface of every curve with enough budgets and runs."""
    laws: dict[str, Any] = {}
    columns = {"params": "flops_per_token / 6", "tokens": "tokens", "loss": "val_loss"}
    for curve, rows in done.groupby("curve", sort=False):
        if rows["budget"].nunique() >= MIN_BUDGETS and len(rows) > len(fields(Surface)):
            sized = rows.assign(**{columns["params"]: rows["flops_per_token"] / 6})
            surface = fit_parametric(sized, **columns, budget="budget", bootstrap=RESAMPLES)
            laws[f"{curve}/parametric"] = {**surface.to_dict(), "method": str(curve), **columns}
    return laws


def read_fits(path: Path) -> dict[str, Any]:
    """The result of `fit_study` from its file, with curves for their names; raises `UserError` for any other file."""
    fits = read_json(path)
    keys = {"baseline", "budgets", "claims", "conventions", "curves", "growth", "laws", "multipliers", "rates"}
    if isinstance(fits, dict) and keys <= fits.keys():
        return from_names(fits)
    raise UserError(f"{path}: not the fits of a study as this version writes them: make figures, to fit it again")
