"""Differences between methods at their compute optimum, from losses on the same validation sequences.

Whether a sequence is easy or hard is common to all models and by far the largest part of a loss's uncertainty. A
bootstrap over sequences that draws the same ones for every run (Efron and Tibshirani 1993, chapter 8: paired data are
resampled as pairs) leaves it out of the difference. Each resample refits every method's parabola.

An interval covers the sampling of validation sequences, not seeds nor the choice of learning rate.
"""

from dataclasses import dataclass

import numpy as np

from peerscale.laws.bootstrap import LEVEL, percentile_interval, resample_counts
from peerscale.laws.parabola import fit_parabolas, minima
from peerscale.laws.results import Array

RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """Percentile interval of a bootstrap."""

    low: float
    high: float
    resamples: int
    without_minimum: int
    """Resamples left out because a parabola of theirs opened downwards."""


def resampled_losses(sequence_losses: Array, *, resamples: int = RESAMPLES, seed: int = 0) -> Array:
    """Mean losses of runs over resampled sequences: the same sequences for every run.

    Args:
        sequence_losses: (runs, sequences), nats per token; column j of every run is the same text.
        resamples: number of resamples.
        seed: of `numpy.random.default_rng`; two calls with one seed and one number of sequences draw the same.

    Returns:
        (resamples, runs).
    """
    n = sequence_losses.shape[1]
    return resample_counts(n, resamples, seed) @ sequence_losses.T / n


def optimum_losses(x: Array, losses: Array) -> Array:
    """Loss at the vertex of the parabola in log x, for many sets of losses at once.

    Args:
        x: (runs,), raw units; at least three different values.
        losses: (sets, runs).

    Returns:
        (sets,): c0 - c1^2 / (4 c2); NaN where the parabola has no minimum.
    """
    return minima(*fit_parabolas(x, losses))[1]


def difference_interval(losses: Array, reference: Array, *, level: float = LEVEL) -> Interval:
    """Interval of `losses - reference`, both (resamples,) and from the same resamples."""
    difference = losses - reference
    low, high = percentile_interval(difference, level)
    missing = int(np.sum(~np.isfinite(difference)))
    return Interval(low=low, high=high, resamples=len(difference), without_minimum=missing)
