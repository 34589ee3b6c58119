"""Intervals by the bootstrap (Efron 1979): refits of resampled runs.

They cover only the scatter of the runs around the law. They do not cover the misfit of the law outside the data, nor
the noise of a loss that was evaluated on few tokens, unless that noise differs between runs.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from peerscale.laws.linear_fit import LEVEL, Array

STORED_DRAWS = 500
"""Number of draws written to JSON, from which a reader can compute the interval of any prediction."""


def resample_counts(n: int, resamples: int, seed: int, clusters: Array | None = None) -> Array:
    """How often each of `n` runs occurs in each resample, (resamples, n).

    Runs with the same label in `clusters` (n,) are drawn together; None: every run is its own cluster.
    """
    labels = np.arange(n) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    n_clusters = labels.max() + 1
    draw = np.random.default_rng(seed).multinomial
    return draw(n_clusters, np.full(n_clusters, 1 / n_clusters), size=resamples)[:, labels]


def resample_residuals(residuals: Array, resamples: int, seed: int, clusters: Array) -> Array:
    """Residuals drawn with replacement, (resamples, n), for other runs, or designs too small to lose one (five sizes).

    Every run takes the residual of a run in a drawn cluster; runs with the same label in `clusters` (n,) draw from the
    same cluster, so that a shift common to a cluster stays common. NaN residuals are never drawn; the result is NaN if
    there are no others.
    """
    rng = np.random.default_rng(seed)
    n, labels = len(residuals), np.unique(clusters, return_inverse=True)[1]
    known = np.flatnonzero(np.isfinite(residuals))
    if not len(known):
        return np.full((resamples, n), np.nan)
    by_cluster = known[np.argsort(labels[known], kind="stable")]
    sizes = np.bincount(labels[known], minlength=labels.max() + 1)
    first = np.cumsum(sizes) - sizes
    source = rng.choice(np.flatnonzero(sizes), size=(resamples, len(sizes)))[:, labels]
    return residuals[by_cluster[first[source] + np.floor(rng.random((resamples, n)) * sizes[source]).astype(int)]]


def percentile_interval(values: Array) -> tuple[float, float]:
    """95 % percentile interval of the finite `values` (draws,); NaN if there are none."""
    finite = values[np.isfinite(values)]
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(finite, [tail, 100 - tail]) if len(finite) else (np.nan, np.nan)
    return float(low), float(high)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bootstrap:
    """Coefficients of the refits."""

    draws: Mapping[str, Array]
    """By coefficient; the first axis runs over the successful resamples."""
    resamples: int
    """Number of requested resamples."""
    failed: int
    """Number of resamples without a fit, which are left out."""
    at_bound: int = 0
    """Number of the other resamples that ended on a bound; they are kept."""
    seed: int

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Percentile interval of every coefficient."""
        return {name: percentile_interval(values) for name, values in self.draws.items() if values.ndim == 1}

    def law(self, form: type) -> Any:
        """A law of class `form` whose coefficients are arrays of draws, or their defaults if they have no draws."""
        return form(**{item.name: self.draws[item.name] for item in fields(form) if item.name in self.draws})

    def to_dict(self) -> dict[str, Any]:
        """Counts, seed, level and the first draws (of coefficients and of losses at optima) to six digits, for JSON."""
        six_digits = np.vectorize(lambda value: float(f"{value:.6g}"), otypes=[float])
        draws = {
            name: six_digits(values[:STORED_DRAWS]).tolist()
            for name, values in self.draws.items()
            if values.ndim == 1 or name == "loss"
        }
        return asdict(self) | {"level": LEVEL, "draws": draws}
