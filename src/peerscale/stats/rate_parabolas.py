"""Parabolas of loss against the logarithm of the learning rate, with one curvature for all models.

Rate laws and rate brackets are such parabolas, and differ in what the places of their minima have in common.
"""

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from peerscale.laws.linear_fit import Array, LinearFit

REACH = 3.2
"""A curve is fitted by a parabola within this factor of the best rate that was tried."""


def parabolas(x: Array, loss: Array, curves: Array, places: Array) -> LinearFit:
    """Parabolas with one curvature, loss = level_curve + k x^2 - 2 x (places . k theta); the coefficients: k, k theta.

    The minimum of a curve is at x = places . theta, so theta is `ratio`s of later coefficients and the first.

    Args:
        x: ln rate (n,).
        loss: (n,).
        curves: label of each run's curve (n,).
        places: (n, coefficients).
    """
    return LinearFit(design=np.column_stack([x**2, -2 * x[:, None] * places]), values=loss, groups=curves)


def opens_upwards(fit: LinearFit) -> bool:
    """Whether runs determine `parabolas` that have minima."""
    return fit.determined and bool(fit.coefficients[0] > 0)


def within_reach(x: Array, x_of_lowest: Array | float, reach: float = REACH) -> Array:
    """Whether rates are fitted, given ln rate (n,) of the runs and of the lowest loss on their curves; see `REACH`."""
    return np.abs(x - x_of_lowest) <= math.log(reach)


def row_groups(table: pd.DataFrame, columns: list[str]) -> Array:
    """Integers (rows,), equal for rows with equal values, missing ones too, in `columns`."""
    if not columns:
        return np.zeros(len(table), int)
    return table.groupby(columns, dropna=False, sort=False).ngroup().to_numpy()


def fit_brackets(factor: Array, loss: Array, bracket: Sequence[Hashable], seed: Sequence[int]) -> dict[str, Any]:
    """The possible cost of rates that are not the best: fit runs (runs,) of models trained at multiples of their rate.

    A bracket is the losses of one model at its usual rate (factor 1) and at other factors, such as 0.5 and 2. It is a
    parabola in the logarithm of the factor:

        loss = lowest + k (ln factor - ln best)^2 = level + k (ln factor)^2 - 2 (k ln best) ln factor

    All brackets share the curvature k; each has its own best factor, and each of its seeds its own level, the loss at
    factor 1. The gain of the best rate over the usual one is k (ln best)^2.

    Args:
        factor: each run's rate divided by the usual rate.
        loss: nats per token.
        bracket: each run's bracket, any hashable value. A bracket needs only two factors if another one has three.
        seed: seed of each run.

    Returns:
        `curvature` k, in nats per (ln rate)^2, and `curvature_se`; `scatter` of the losses around the parabolas, in
        nats; `df`, degrees of freedom of the scatter and of every error; and for `each` bracket its `best` factor, the
        `lowest` loss (at that factor, averaged over seeds), the `gain` (fitted loss at factor 1 minus the lowest) and
        its standard error `se`, to second order in ln best, so that it is not zero where the usual rate is the best.
        NaN if the brackets do not determine a parabola that opens upwards, and for errors without degrees of freedom.
    """
    x, names = np.log(factor), list(dict.fromkeys(bracket))
    of = np.array([names.index(one) for one in bracket])
    curves = row_groups(pd.DataFrame({"of": of, "seed": seed}), ["of", "seed"])
    fit = parabolas(x, loss, curves, np.eye(len(names))[of])
    unit, covariance = np.eye(1 + len(names)), fit.covariance
    k = float(fit.coefficients[0]) if opens_upwards(fit) else math.nan
    at_usual = loss - k * x**2 + 2 * x * fit.coefficients[1 + of]  # shifted along the parabola to factor 1
    each = []
    for i, product in enumerate(fit.coefficients[1:]):
        log_best = float(product) / k
        level = float(pd.Series(at_usual[of == i]).groupby(curves[of == i]).mean().mean())
        of_gain = 2 * log_best * unit[1 + i] - log_best**2 * unit[0]  # gradient of product^2 / k
        of_best = (unit[1 + i] - log_best * unit[0]) / k
        gain = k * log_best**2
        variance = float(of_gain @ covariance @ of_gain + 2 * (k * (of_best @ covariance @ of_best)) ** 2)
        se = math.sqrt(max(variance, 0.0)) if math.isfinite(variance) else math.nan
        each.append({"best": float(np.exp(log_best)), "lowest": level - gain, "gain": gain, "se": se})
    curvature = fit.estimate(unit[0])
    value, se = (curvature.value, curvature.se) if fit.determined else (math.nan, math.nan)
    return {"curvature": value, "curvature_se": se, "scatter": fit.scatter, "df": fit.df, "each": each}
