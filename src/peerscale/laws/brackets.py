"""What learning rates off their best may cost, from models that were also trained at multiples of their rate.

A bracket is the losses of one model at its usual rate, factor 1, and at other factors, such as a half and two. They
are a parabola in the logarithm of the factor:

    loss = lowest + k (ln factor - ln best)^2 = level + k (ln factor)^2 - 2 (k ln best) ln factor

All brackets share the curvature k; each has its own best factor, and each of its seeds its own level, the loss at
factor 1. So the loss is linear in the levels, k, and each bracket's k ln best, and one linear regression gives them.
The gain of the best rate over the usual one is k (ln best)^2.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from peerscale.laws.rates import ParabolaRegression
from peerscale.laws.solver import Array


def fit_brackets(factor: Array, loss: Array, bracket: Sequence[str], seed: Sequence[int]) -> dict[str, Any]:
    """Fit runs (runs,) of any number of brackets, all together.

    Args:
        factor: of each run's rate to the usual one.
        loss: nats per token.
        bracket: name of each run's bracket. Two factors are enough in it where another bracket has three.
        seed: of each run.

    Returns:
        `curvature` k, in nats per (ln rate)^2, and `curvature_se`; `scatter` of the losses about the parabolas, nats;
        `df`, degrees of freedom of the scatter and of every error; and of `each` bracket its `best` factor, the
        `lowest` loss (at that factor, the mean over seeds), the `gain`, fitted loss at factor 1 minus the lowest, and
        its standard error `se` to first order. NaN where the brackets determine no parabola that opens upwards, and
        for errors without any degrees of freedom.
    """
    x, (of, names) = np.log(factor), pd.factorize(np.array(bracket))
    curves = pd.Series(bracket).str.cat(pd.Series(seed).astype(str), " ")
    fit = ParabolaRegression.of(x, loss, curves.to_numpy(), np.eye(len(names))[of])
    k = fit.k if fit.determined and fit.k > 0 else math.nan
    at_usual = loss - k * x**2 + 2 * x * fit.products[of]  # each run's loss carried to factor 1
    each = []
    for i in range(len(names)):
        log_best = float(fit.products[i] / k)
        gradient = np.zeros(1 + len(names))  # of the gain, (k ln best)^2 / k
        gradient[0], gradient[1 + i] = -(log_best**2), 2 * log_best
        level = float(pd.Series(at_usual[of == i]).groupby(curves[of == i].to_numpy()).mean().mean())
        gain, variance = k * log_best**2, float(gradient @ fit.covariance @ gradient)
        se = math.sqrt(max(variance, 0.0)) if math.isfinite(variance) else math.nan
        each.append({"best": float(np.exp(log_best)), "lowest": level - gain, "gain": gain, "se": se})
    curvature, error = (fit.k, fit.k_se) if fit.determined else (math.nan, math.nan)
    return {"curvature": curvature, "curvature_se": error, "scatter": fit.scatter, "df": fit.df, "each": each}
