"""The power law through optima at several budgets, which approaches 1 and 2 have in common."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from peerscale.laws.bootstrap import percentile_interval
from peerscale.laws.holdout import HoldOut
from peerscale.laws.results import Array, Number

MIN_BUDGETS = 3
"""Different optima wanted for a power law: one more than its coefficients."""


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """x*(C) = coefficient * C^exponent; both None with too few optima."""

    exponent: Number | None
    """d log x* / d log C."""
    coefficient: Number | None
    """x* at C = 1 FLOP."""

    def optimum(self, budget: ArrayLike) -> Number:
        """Compute-optimal x at `budget` FLOPs; NaN without a power law."""
        if self.exponent is None or self.coefficient is None:
            return np.full_like(np.asarray(budget, float), np.nan)
        return self.coefficient * np.asarray(budget, float) ** self.exponent


def fit_power_law(budgets: Array, optima: Array) -> tuple[Array, Array]:
    """Least squares of log10 x*, (..., budgets), on log10 C: exponent and coefficient, (...)."""
    log_budgets, log_optima = np.log10(budgets), np.log10(optima)
    centred = log_budgets - log_budgets.mean()
    exponent = log_optima @ centred / (centred @ centred)
    with np.errstate(over="ignore", under="ignore"):
        return exponent, 10 ** (log_optima.mean(axis=-1) - exponent * log_budgets.mean())


def predict_largest(
    budgets: Array, optima: Array, refits: Iterable[tuple[Array, Array]] = (), observed: Array | None = None
) -> HoldOut | None:
    """The optimum of the largest budget from a power law through those of the others, two or more.

    Args:
        budgets, optima: (budgets,), ascending. The budgets at the end that share one optimum are held out together.
        refits: budgets and optima of each bootstrap resample.
        observed: the bootstrap's optima at the largest budget.
    """
    held = budgets > budgets[optima != optima[-1]].max(initial=0)
    start, at = float(budgets[held][0]), float(np.exp(np.log(budgets[held]).mean()))

    def prediction(budgets: Array, optima: Array) -> float:
        below = budgets < start
        if len(np.unique(optima[below])) < 2:
            return float("nan")
        exponent, coefficient = fit_power_law(budgets[below], optima[below])
        with np.errstate(over="ignore", invalid="ignore"):
            return float(coefficient * at**exponent)

    predicted, actual = prediction(budgets, optima), float(optima[-1])
    if not np.isfinite(predicted):
        return None
    drawn = np.array([prediction(*refit) for refit in refits])
    return HoldOut(
        quantity="x",
        budget=start,
        n=int(held.sum()),
        observed=actual,
        predicted=predicted,
        interval=percentile_interval(drawn) if len(drawn) else None,
        observed_interval=None if observed is None else percentile_interval(observed),
        rmse=abs(predicted - actual),
        mape=100 * abs(predicted / actual - 1),
    )
