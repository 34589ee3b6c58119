"""Everything that is computed once from a study's tables, for its `fits.json`."""

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

import pandas as pd

from peerscale.laws.fitting import to_plain
from peerscale.laws.isoflop import MIN_BUDGETS
from peerscale.laws.parametric import Surface, fit_parametric
from peerscale.stats.conventions import multipliers_by_convention
from peerscale.stats.curves_of_runs import method_names, usable, without_brackets
from peerscale.stats.rates import fit_law

RESAMPLES = 1000
"""Number of resamples of every bootstrap of a law."""


def fit_study(
    runs: pd.DataFrame,
    compared: Mapping[str, Any],
    held_out: Collection[int] = (),
) -> dict[str, Any]:
    """Statistics and laws of a study as plain values for JSON.

    Args:
        runs: the study's table; laws and conventions do not use its rate brackets.
        compared: the result of `comparison.compare`.
        held_out: widths (d_model) that a law of learning rates is not fitted to.

    Returns:
        `compared`, and also
        `laws`: `<method>`, the power law of optimal sizes; and, with at least three budgets, `<method>/parametric`, the
        loss surface over tokens D and N = FLOPs per token / 6, so that C = 6 N D is exact. Both exponents of a method
        refer to the same measure of size.
        `conventions`: multipliers under other FLOP conventions.
        `rates`: `law`, of the best rates of a study that varies them (None: too few runs), besides the `rates` of
        `compared`: `brackets` of the usual rates and the errors from them.
    """
    runs = without_brackets(runs)
    return {
        **compared,
        "laws": compared["laws"] | _surfaces(runs),
        "conventions": to_plain(multipliers_by_convention(runs, compared["budgets"], compared.get("trend_from", 0.0))),
        "rates": {"law": to_plain(fit_law(runs, held_out))} | compared.get("rates", {}),
    }


def _surfaces(runs: pd.DataFrame) -> dict[str, Any]:
    """The loss surface of every method with enough budgets and runs."""
    laws: dict[str, Any] = {}
    for key, rows in runs.assign(name=method_names(runs))[usable(runs)].groupby("name", sort=False):
        name = str(key)
        if rows["budget"].nunique() >= MIN_BUDGETS and len(rows) > len(fields(Surface)):
            columns = {"params": "flops_per_token / 6", "tokens": "tokens", "loss": "val_loss"}
            sized = rows.assign(**{columns["params"]: rows["flops_per_token"] / 6})
            surface = fit_parametric(sized, **columns, budget="budget", bootstrap=RESAMPLES)
            laws[f"{name}/parametric"] = {**surface.to_dict(), "method": name, **columns}
    return laws
