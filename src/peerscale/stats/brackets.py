"""The rate brackets of a study: cells that it also trained at multiples of their learning rate (`optim.lr_factor`).

They are not points of its curves. They show how much lower a method's loss could be at a better rate, which gives the
part of its error that comes from the choice of the rate.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import pandas as pd

from peerscale.config.study import RATE_FACTOR
from peerscale.stats.curves_of_runs import are_brackets, axes_of, method_names, usable, without_brackets
from peerscale.stats.rate_parabolas import fit_brackets

COST_DF = 2.0
"""Degrees of freedom of an error that a study's file states: the largest of a few brackets, it is known about as well
as a standard deviation of three values."""


class RateError(NamedTuple):
    """The part of the error of a method's loss at a budget that comes from its learning rate."""

    se: float
    """Nats per token."""
    df: float
    source: str
    """`brackets`, or `cost` if the study's file states the error."""


class RateErrors(dict[tuple[float, str], RateError]):
    """The known errors, by budget and name of the method."""

    def of(self, budget: float, *names: str) -> list[tuple[float, float]]:
        """The known errors of several methods: standard errors and degrees of freedom."""
        return [(self[budget, name].se, self[budget, name].df) for name in names if (budget, name) in self]


def bracket_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """The finished runs of all brackets that have a finished cell at the usual rate, including that cell.

    Returns:
        The rows with `name`, the name of the curve, and `factor`, the rate divided by the usual rate.
    """
    axes = axes_of(runs).map(lambda each: {key: each[key] for key in sorted(each) if key != RATE_FACTOR})
    keys = ["budget", "method", "variant", "size", "seed", "rest"]
    rows = runs.assign(rest=axes.map(str), variant=runs["variant"].fillna(""), bracket=are_brackets(runs))
    main = rows[~rows["bracket"] & usable(rows)]
    main = main.assign(name=method_names(without_brackets(runs))[main.index])
    others = rows[rows["bracket"] & usable(rows)].merge(main[[*keys, "name", "lr"]], on=keys, suffixes=("", "_usual"))
    others["factor"] = (others["lr"] / others["lr_usual"]).map(lambda factor: float(f"{factor:.6g}"))
    of_brackets = main.merge(others[keys].drop_duplicates(), on=keys).assign(factor=1.0)
    found = pd.concat([of_brackets, others.drop(columns="lr_usual")], ignore_index=True)
    return found.sort_values(["budget", "size", "name", "seed", "factor"], ignore_index=True)


def fit_rate_brackets(runs: pd.DataFrame) -> dict[str, Any] | None:
    """Fit all brackets of a study together; None if there are none.

    Returns:
        The result of `laws.rates.fit_brackets`; `each` bracket also has its budget, size, method, number of seeds and
        `losses` by factor (means over seeds).
    """
    if not are_brackets(runs).any() or (rows := bracket_runs(runs)).empty:
        return None
    places = list(zip(rows["budget"], rows["size"], rows["name"], strict=True))
    names = [f"{budget!r} {size} {name}" for budget, size, name in places]
    fit = fit_brackets(rows["factor"].to_numpy(float), rows["val_loss"].to_numpy(float), names, rows["seed"].tolist())
    for (budget, size, name), found in zip(dict.fromkeys(places), fit["each"], strict=True):
        mine = rows[[place == (budget, size, name) for place in places]]
        losses = mine.groupby("factor")["val_loss"].mean()
        found |= {
            "budget": float(budget), "size": str(size), "method": str(name), "seeds": mine["seed"].nunique(),
            "losses": {f"{factor:g}": float(loss) for factor, loss in losses.items()},
        }  # fmt: skip
    return fit


def rate_errors(
    brackets: Mapping[str, Any] | None, places: Iterable[tuple[float, str]], cost: float | None = None
) -> RateErrors:
    """The error of every bracketed method and budget: the root of the mean of gain^2 + se^2 over its brackets.

    The gain is how much the loss would fall at the best rate. The loss is not corrected by the gain; the gain is a part
    of the error. Degrees of freedom are Satterthwaite's: se^2 has those of the scatter, and gain^2 is taken as exact,
    since it is not an estimated variance.

    Args:
        brackets: the result of `fit_rate_brackets`. A single bracket has no scatter and so gives no error.
        places: budgets and names of the study's methods.
        cost: nats per token, used if a method has no bracket at a budget; None: not known.
    """
    known = RateErrors() if cost is None else RateErrors(dict.fromkeys(places, RateError(cost, COST_DF, "cost")))
    for place, rows in pd.DataFrame(brackets["each"]).groupby(["budget", "method"]) if brackets else ():
        of_gain, of_scatter = (rows[["gain", "se"]] ** 2).mean(skipna=False)
        if brackets and math.isfinite(total := float(of_gain + of_scatter)):
            df = brackets["df"] * (total / float(of_scatter)) ** 2 if of_scatter > 0 else math.inf
            known[place] = RateError(math.sqrt(total), df, "brackets")
    return known
