"""How much the size means of methods scatter around their curves at one budget.

The mean over the n seeds of a size of method m has the variance k_m (tau^2 + sigma_m^2 / n), where tau^2 is the misfit
of sizes, sigma_m^2 the scatter of seeds, and k_m, near 1, says how well the curve fits this method. A method has few
runs, so its sigma_m^2 and k_m are means of its own estimate and of the common one, which counts for `PRIOR_DF` degrees
of freedom (as the variances of genes in Smyth 2004). No test decides between a common and an own variance. The common
variances are M-estimates of scale: the scatter of a method enters them divided by its own multiple, so that one noisy
method hardly widens the intervals of the others.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy.optimize import root_scalar
from scipy.stats import chi2

from peerscale.laws.linear_fit import Array

PRIOR_DF = 3.0
"""Degrees of freedom that the common variance counts for in a method's own, however many runs others have."""
QUANTILES = (np.arange(400) + 0.5) / 400


@dataclass(frozen=True, kw_only=True, slots=True)
class Noise:
    """The noise of the methods of one budget; arrays are (methods,)."""

    misfit: float
    """tau^2; without replicates it includes seeds."""
    seeds: Array
    """sigma_m^2, of one seed; 0 without replicates of any method."""
    multiple: Array
    """k_m."""
    residual_df: Array
    """Degrees of freedom of k_m; 0 without misfit, since k_m is then 1."""
    seeds_df: Array
    """Degrees of freedom of sigma_m^2."""

    @property
    def df(self) -> Array:
        """Degrees of freedom of each method's whole variance, about."""
        return self.residual_df if self.misfit else self.seeds_df


def estimate_noise(
    residual_squares: Array, residual_df: Array, seed_shares: Array, seed_squares: Array, seed_df: Array
) -> Noise:
    """The noise of several methods; all arguments are (methods,).

    Args:
        residual_squares: sum of the squared residuals of a method's size means.
        residual_df: their degrees of freedom, the sum of 1 - leverage.
        seed_shares: the multiple of sigma_m^2 that is expected in their mean square, some 1 / seeds.
        seed_squares: sum of the squared deviations of runs from the mean of their size.
        seed_df: their degrees of freedom, runs less sizes.
    """
    seeds, seeds_df = shrunk_variances(seed_squares, seed_df)
    prior, known = _prior_df(residual_df), residual_df > 0
    if not known.any():
        return Noise(
            misfit=math.nan, seeds=seeds, multiple=np.ones(len(seeds)), residual_df=residual_df, seeds_df=seeds_df
        )
    mean_squares, of_seeds = _ratio(residual_squares, residual_df), seeds * seed_shares
    misfit = _common(mean_squares[known], residual_df[known], prior[known], lambda tau: tau + of_seeds[known])
    if not misfit:  # then residuals are a second estimate of the scatter of seeds
        squares = seed_squares + _ratio(residual_squares, seed_shares)
        seeds, seeds_df = shrunk_variances(squares, seed_df + residual_df)
        none = np.zeros(len(seeds))
        return Noise(misfit=0.0, seeds=seeds, multiple=none + 1, residual_df=none, seeds_df=seeds_df)
    expected = misfit + of_seeds
    multiple = _ratio(prior + residual_df * _ratio(mean_squares, expected), prior + residual_df)
    return Noise(misfit=misfit, seeds=seeds, multiple=multiple, residual_df=prior + residual_df, seeds_df=seeds_df)


def shrunk_variances(squares: Array, df: Array) -> tuple[Array, Array]:
    """Each method's variance and its degrees of freedom (methods,), from sums of squares with `df` degrees of freedom.

    The variance is 0 if no method has a degree of freedom.
    """
    prior, known = _prior_df(df), df > 0
    if not known.any():
        return np.zeros(len(df)), np.zeros(len(df))
    common = _common(
        _ratio(squares, df)[known], df[known], prior[known], lambda variance: np.full(known.sum(), variance)
    )
    return _ratio(prior * common + squares, prior + df), prior + df


def _prior_df(df: Array) -> Array:
    """The degrees of freedom of the common variance for each method: at most as many as the other methods have."""
    others = df.sum() - df
    return PRIOR_DF * others / (PRIOR_DF + others)


def _common(mean_squares: Array, df: Array, prior: Array, expected: Callable[[float], Array]) -> float:
    """The variance >= 0 for which mean squares are on average as large as `expected` says; large ones count less."""
    if len(df) == 1:  # nothing to be shrunk towards
        return max(0.0, float(mean_squares[0] - expected(0.0)[0]))
    usual = np.array([_usual(*pair) for pair in zip(df.tolist(), prior.tolist(), strict=True)])

    def excess(variance: float) -> float:
        there = expected(variance)
        return float((df / there) @ (_weighted(mean_squares / there, df, prior) - usual) * there.mean())

    low, high = 1e-9 * float(mean_squares.max()), 1e3 * float(mean_squares.max())
    if not high or excess(low) <= 0:
        return 0.0
    return root_scalar(excess, bracket=(low, high), rtol=1e-12).root


def _weighted(ratio: Array, df: Array | float, prior: Array | float) -> Array:
    """A mean square over its expectation, divided by the multiple that it gives its method."""
    return ratio * (prior + df) / (prior + df * ratio)


@cache
def _usual(df: float, prior: float) -> float:
    """The mean of `_weighted` if a mean square is chi-squared with `df` degrees of freedom: no method is noisy."""
    return float(_weighted(chi2.ppf(QUANTILES, df) / df, df, prior).mean())


def _ratio(above: Array, below: Array) -> Array:
    """above / below, and 0 where `below` is 0."""
    return np.divide(above, below, out=np.zeros(len(above)), where=below > 0)
