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
from dataclasses import dataclass

import numpy as np

from peerscale.laws.rates import ParabolaRegression
from peerscale.laws.solver import Array


@dataclass(frozen=True, kw_only=True, slots=True)
class Bracket:
    """One bracket; all NaN where the brackets do not determine a parabola that opens upwards."""

    name: str
    best: float
    """The factor of lowest loss."""
    lowest: float
    """The loss there, the mean over seeds, nats per token."""
    gain: float
    """Fitted loss at factor 1 minus the lowest, nats per token; never negative."""
    se: float
    """Standard error of the gain, to first order from the scatter about the parabolas; NaN without any to judge by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BracketFit:
    """The parabolas of all brackets, fitted together."""

    curvature: float
    """k, nats per (ln rate)^2."""
    curvature_se: float
    scatter: float
    """Standard deviation of the losses about the parabolas, nats; NaN without degrees of freedom."""
    df: int
    """Degrees of freedom of the scatter, and of every standard error here."""
    brackets: tuple[Bracket, ...]


def fit_brackets(factor: Array, loss: Array, bracket: Sequence[str], seed: Sequence[int]) -> BracketFit:
    """Fit runs (runs,) of any number of brackets.

    Args:
        factor: of each run's rate to the usual one.
        loss: nats per token.
        bracket: name of each run's bracket. Two factors are enough in it where another bracket has three.
        seed: of each run.
    """
    x, names = np.log(factor), list(dict.fromkeys(bracket))
    of = (np.array(bracket)[:, None] == names).astype(float)
    curves = np.array([f"{name} {number}" for name, number in zip(bracket, seed, strict=True)])
    fit = ParabolaRegression.of(x, loss, curves, of)
    k, scatter = fit.k, math.sqrt(fit.rss / fit.df) if fit.df else math.nan
    at_usual = loss - k * x**2 + 2 * x * (of @ fit.products)  # each run's loss carried to factor 1
    found = []
    for i, name in enumerate(names):
        log_best = float(fit.products[i] / k) if fit.determined and k > 0 else math.nan
        gradient = np.zeros(1 + len(names))  # of the gain, (k ln best)^2 / k
        gradient[0], gradient[1 + i] = -(log_best**2), 2 * log_best
        mine = curves[of[:, i] > 0]
        mean = float(np.mean([at_usual[curves == curve].mean() for curve in dict.fromkeys(mine)]))
        found.append(
            Bracket(
                name=name, best=math.exp(log_best), lowest=mean - k * log_best**2, gain=k * log_best**2,
                se=math.sqrt(max(gradient @ fit.covariance @ gradient, 0.0)) if math.isfinite(log_best) else math.nan,
            )
        )  # fmt: skip
    return BracketFit(
        curvature=k if fit.determined else math.nan, scatter=scatter, df=fit.df, brackets=tuple(found),
        curvature_se=math.sqrt(fit.covariance[0, 0]) if fit.determined else math.nan,
    )  # fmt: skip
