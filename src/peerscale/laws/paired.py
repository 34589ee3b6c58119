"""Differences between methods at their compute optimum, from losses on the same validation sequences.

Whether a sequence is easy or hard is common to all models and by far the largest part of a loss's uncertainty. A
bootstrap over sequences that draws the same ones for every run (Efron and Tibshirani 1993, chapter 8: paired data are
resampled as pairs) leaves it out of the difference. Each resample refits every method's parabola.

An interval covers the sampling of validation sequences, not seeds nor the choice of learning rate.
"""

from dataclasses import dataclass

import numpy as np

from peerscale.laws.results import Array

RESAMPLES = 2000
LEVEL = 0.95


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
    rng = np.random.default_rng(seed)
    counts = np.stack([np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(resamples)])
    return counts @ sequence_losses.T / n


def optimum_losses(x: Array, losses: Array) -> Array:
    """Loss at the vertex of the parabola in log x, for many sets of losses at once.

    Args:
        x: (runs,), raw units; at least three different values.
        losses: (sets, runs).

    Returns:
        (sets,): c0 - c1^2 / (4 c2); NaN where the parabola has no minimum.
    """
    z = np.log10(x)
    z = z - z.mean()  # z^2 of uncentred sizes is almost collinear with z
    design = np.stack([np.ones_like(z), z, z**2], axis=1)
    c0, c1, c2 = np.linalg.lstsq(design, losses.T, rcond=None)[0]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(c2 > 0, c0 - c1**2 / (4 * c2), np.nan)


def difference_interval(losses: Array, reference: Array, *, level: float = LEVEL) -> Interval:
    """Interval of `losses - reference`, both (resamples,) and from the same resamples."""
    difference = losses - reference
    finite = difference[np.isfinite(difference)]
    tail = (1 - level) / 2
    low, high = np.quantile(finite, [tail, 1 - tail]) if len(finite) else (np.nan, np.nan)
    return Interval(
        low=float(low), high=float(high), resamples=len(difference), without_minimum=len(difference) - len(finite)
    )
