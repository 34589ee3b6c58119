"""The optima of each method over the budgets of a study, with draws from their errors; compute multipliers and power
laws of optimal sizes from these."""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from peerscale.laws.bootstrap import percentile_interval, resample_counts
from peerscale.laws.isoflop import MIN_BUDGETS, fit_power_law
from peerscale.laws.linear_fit import LEVEL, Array
from peerscale.stats.brackets import RateErrors
from peerscale.stats.curve import Curve
from peerscale.stats.multiplier import compute_multipliers
from peerscale.stats.optima import OptimaFit, Optimum

X = "flops_per_token"
"""The measure of size in all fits, since it means the same for every method."""

GROWTH_BUDGETS = 4
"""Fewest budgets for which a growth of the multiplier is reported."""

DRAWS = 1000


class Budget(NamedTuple):
    """The fit of one budget, and the losses behind it."""

    budget: float
    fit: OptimaFit
    optima: dict[Curve, Optimum]
    sequences: Array | None
    """Losses of the validation sequences at every size mean (points, sequences); None if not known for all."""


def frontiers_of(fitted: Sequence[Budget], rates: RateErrors) -> dict[Curve, Array]:
    """x and loss of each curve's optimum at every budget, (2, 1 + draws, budgets): first the fit, then the draws.

    Size means are drawn around the fit with the errors of misfit and seeds. Their variance is drawn too, so that
    intervals are Student's. Budgets with the same validation sequences draw the same ones. A method's losses are also
    drawn with the error of its learning rate if that is known. NaN if a method's optimum has no number; draws are also
    NaN if the sizes leave no degrees of freedom, as three of a single method.
    """
    curves = dict.fromkeys(curve for one in fitted for curve in one.optima)
    frontiers = {curve: np.full((2, 1 + DRAWS, len(fitted)), math.nan) for curve in curves}
    for i, one in enumerate(fitted):
        variances, df = one.fit.variances, np.where(one.fit.noise.df > 0, one.fit.noise.df, math.nan)
        rng = np.random.default_rng(round(one.budget))
        scale = np.sqrt(df / rng.chisquare(df, (DRAWS, len(df))))
        errors = rng.normal(size=(DRAWS, len(one.fit.x))) * np.sqrt(variances) * scale[:, one.fit.method]
        drawn = one.fit.losses - one.fit.linear.residuals + errors
        if one.sequences is not None:
            drawn += _resampled(one.sequences.shape[1], DRAWS) @ one.sequences.T
        minima = np.stack(one.fit.optima_of(drawn))
        for method, (curve, optimum) in enumerate(one.optima.items()):
            if optimum.status.has_number:
                frontiers[curve][:, 0, i] = optimum.x, optimum.loss
                frontiers[curve][:, 1:, i] = minima[:, :, method]
                for se, _ in rates.of(one.budget, curve):
                    frontiers[curve][1, 1:, i] += rng.normal(0, se, DRAWS)
    return frontiers


@cache
def _resampled(n: int, draws: int) -> Array:
    """Weights (draws, n) by which the mean over resampled sequences differs from the mean over all."""
    return resample_counts(n, draws, seed=0) / n - 1 / n


def multipliers_of(
    fitted: Sequence[Budget], frontiers: Mapping[Curve, Array], baseline: str, trend_from: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The baseline's compute over each method's, by budget; with four or more, the slope of its log in log10 C.

    The trend is the budgets from `trend_from` on: the slope is theirs, and their multipliers depend on no other budget.
    """
    budgets, found, slopes = np.array([one.budget for one in fitted]), [], []
    trend = budgets >= trend_from
    for curve, (_, losses) in frontiers.items():
        reference = curve.counterpart(baseline, frontiers)
        if reference is None or curve.method == baseline:
            continue
        each = compute_multipliers((budgets, frontiers[reference][1]), (budgets, losses), trend)
        pair, known = {"method": curve, "reference": reference}, np.isfinite(each[0])
        for i in np.flatnonzero(known).tolist():
            found.append({**pair, "budget": budgets[i], "multiplier": each[0, i], **_ends(each[1:, i]),
                          "df": fitted[i].fit.linear.df})  # fmt: skip
        if (used := known & trend).sum() >= GROWTH_BUDGETS:
            slope = math.log(10) * fit_power_law(budgets[used], each[:, used])[0]
            slopes.append({**pair, "slope": slope[0], **_ends(slope[1:])})
    return found, slopes


def _ends(draws: Array) -> dict[str, float]:
    """Ends of the interval of draws; NaN if more than one in twenty draws would be an extrapolation."""
    low, high = percentile_interval(draws) if np.isfinite(draws).mean() >= LEVEL else (math.nan, math.nan)
    return {"low": low, "high": high}


def power_laws(fitted: Sequence[Budget], frontiers: Mapping[Curve, Array]) -> dict[str, Any]:
    """The exponent of the optimal size in the budget of each curve with three or more budgets, with its interval."""
    budgets, laws = np.array([one.budget for one in fitted]), {}
    for curve, (x, _) in frontiers.items():
        known = np.isfinite(x[0])
        if known.sum() >= MIN_BUDGETS:
            exponents, _ = fit_power_law(budgets[known], x[:, known])
            interval = {"exponent": percentile_interval(exponents[1:])}
            laws[str(curve)] = {"law": "isoflop", "method": curve, "exponent": exponents[0], "ci": interval}
    return laws
