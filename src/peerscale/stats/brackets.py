"""The rate brackets of a study: cells that it also trained at multiples of their learning rate (`rate_factor`).

They are not points of its curves. They show how much lower a method's loss could be at a better rate, which gives the
part of its error that comes from the choice of the rate.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import pandas as pd

from peerscale.stats.curve import Curve, curves_of, usable
from peerscale.stats.optima import satterthwaite
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


class RateErrors(dict[tuple[float, Curve], RateError]):
    """The known errors, by budget and curve."""

    def of(self, budget: float, *curves: Curve) -> list[tuple[float, float]]:
        """The known errors of several curves: standard errors and degrees of freedom."""
        return [(self[budget, curve].se, self[budget, curve].df) for curve in curves if (budget, curve) in self]


def bracket_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """The finished runs of all brackets that have a finished cell at the usual rate, including that cell.

    Returns:
        The rows with `curve` and `factor`, the rate divided by the usual rate.
    """
    keys = ["budget", "size", "curve", "seed"]
    rows = runs.assign(curve=curves_of(runs))[usable(runs)]
    rows = rows.assign(order=pd.factorize(rows["curve"])[0])
    is_bracket = rows["rate_factor"] != 1
    others = rows[is_bracket].merge(rows.loc[~is_bracket, [*keys, "lr"]], on=keys, suffixes=("", "_usual"))
    others["factor"] = (others["lr"] / others["lr_usual"]).map(lambda factor: float(f"{factor:.6g}"))
    of_brackets = rows[~is_bracket].merge(others[keys].drop_duplicates(), on=keys).assign(factor=1.0)
    found = pd.concat([of_brackets, others.drop(columns="lr_usual")], ignore_index=True)
    return found.sort_values(["budget", "size", "order", "seed", "factor"], ignore_index=True)


def fit_rate_brackets(runs: pd.DataFrame) -> dict[str, Any] | None:
    """Fit all brackets of a study together; None if there are none.

    Returns:
        The result of `rate_parabolas.fit_brackets`; `each` bracket also has its budget, size, `method` (its curve),
        number of seeds and `losses` by factor (means over seeds).
    """
    if (runs["rate_factor"] == 1).all() or (rows := bracket_runs(runs)).empty:
        return None
    places = list(zip(rows["budget"], rows["size"], rows["curve"], strict=True))
    fit = fit_brackets(rows["factor"].to_numpy(float), rows["val_loss"].to_numpy(float), places, rows["seed"].tolist())
    for (budget, size, curve), found in zip(dict.fromkeys(places), fit["each"], strict=True):
        mine = rows[[place == (budget, size, curve) for place in places]]
        losses = mine.groupby("factor")["val_loss"].mean()
        found |= {
            "budget": float(budget), "size": str(size), "method": curve, "seeds": mine["seed"].nunique(),
            "losses": {f"{factor:g}": float(loss) for factor, loss in losses.items()},
        }  # fmt: skip
    return fit


def rate_errors(
    brackets: Mapping[str, Any] | None, places: Iterable[tuple[float, Curve]], cost: float | None = None
) -> RateErrors:
    """The error of every bracketed curve and budget: the root of the mean of gain^2 + se^2 over its brackets.

    The gain is how much the loss would fall at the best rate. The loss is not corrected by the gain; the gain is a part
    of the error, and taken as exact, since it is not an estimated variance.

    Args:
        brackets: the result of `fit_rate_brackets`. A single bracket has no scatter and so gives no error.
        places: budgets and curves of the study.
        cost: nats per token, used if a curve has no bracket at a budget; None: not known.
    """
    known = RateErrors() if cost is None else RateErrors(dict.fromkeys(places, RateError(cost, COST_DF, "cost")))
    each = pd.DataFrame(brackets["each"]).groupby(["budget", "method"], sort=False) if brackets else ()
    for place, rows in each:
        of_gain, of_scatter = (rows[["gain", "se"]] ** 2).mean(skipna=False)
        if brackets and math.isfinite(total := float(of_gain + of_scatter)):
            df = satterthwaite([(float(of_scatter), brackets["df"]), (float(of_gain), math.inf)])
            known[place] = RateError(math.sqrt(total), df, "brackets")
    return known
