"""The bootstrap (Efron 1979): intervals from refits of resampled runs.

An interval covers the scatter of the runs about the law, and nothing else: not the law's own misfit beyond the data,
nor the noise of a loss evaluated on few tokens unless that differs from run to run.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import numpy as np

from peerscale.laws.objective import Problem
from peerscale.laws.results import Array, to_plain
from peerscale.laws.solver import Solution

LEVEL = 0.95
STORED_DRAWS = 500
"""Draws written to JSON, for intervals of later predictions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bootstrap:
    """Coefficients of the resampled fits."""

    draws: Mapping[str, Array]
    """By coefficient; the first axis is the resamples that succeeded."""
    resamples: int
    """How many were asked for."""
    failed: int
    """How many gave no fit and are left out."""
    at_bound: int = 0
    """How many of the others ended on a bound; they are kept."""
    seed: int

    @classmethod
    def of(cls, problem: Problem, refits: Solution, seed: int) -> Self:
        """From the solver's refits of the resamples."""
        good = ~refits.failed
        return cls(
            draws=problem.coordinates.coefficients(refits.points[good]), resamples=len(good),
            failed=int(np.sum(~good)), at_bound=int(np.sum(refits.at_bound[good])), seed=seed,
        )  # fmt: skip

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Percentile interval of every coefficient."""
        return {name: percentile_interval(values) for name, values in self.draws.items() if values.ndim == 1}

    def law(self, form: type) -> Any:
        """A law of class `form` whose coefficients are arrays of draws; those never fitted keep their defaults."""
        return form(**{item.name: self.draws[item.name] for item in fields(form) if item.name in self.draws})

    def to_dict(self) -> dict[str, Any]:
        """Counts, seed, level and the first draws to six digits, for JSON."""
        draws = {
            name: to_plain([float(f"{value:.6g}") for value in values[:STORED_DRAWS]])
            for name, values in self.draws.items()
            if values.ndim == 1
        }
        return asdict(self) | {"level": LEVEL, "draws": draws}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`, with the draws that were stored."""
        draws = {name: np.asarray(values, float) for name, values in stored["draws"].items()}
        return cls(**{key: stored[key] for key in ("resamples", "failed", "at_bound", "seed")}, draws=draws)


def percentile_interval(values: Array) -> tuple[float, float]:
    """95 % percentile interval of `values` (draws,), leaving out what is not finite; NaN if nothing is."""
    finite = values[np.isfinite(values)]
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(finite, [tail, 100 - tail]) if len(finite) else (np.nan, np.nan)
    return float(low), float(high)


def resample_counts(n: int, resamples: int, seed: int, clusters: Array | None = None) -> Array:
    """How often each of `n` runs occurs in each resample, (resamples, n): weights for a weighted fit.

    Runs with one label in `clusters` (n,) are drawn together; None: every run is its own cluster.
    """
    labels = np.arange(n) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    n_clusters = labels.max() + 1
    draw = np.random.default_rng(seed).multinomial
    return draw(n_clusters, np.full(n_clusters, 1 / n_clusters), size=resamples)[:, labels].astype(float)


def resample_residuals(residuals: Array, resamples: int, seed: int, clusters: Array | None = None) -> Array:
    """Residuals drawn with replacement, (resamples, n), for designs too small to lose a run, such as five sizes.

    Every run takes the residual of a run of a drawn cluster; runs of one cluster draw from the same one, so that a
    shift common to a cluster stays common. Without `clusters` this is the plain residual bootstrap. Residuals that
    are NaN are never drawn; all is NaN if there are no others.
    """
    rng = np.random.default_rng(seed)
    n = len(residuals)
    labels = np.arange(n) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    known = np.flatnonzero(np.isfinite(residuals))
    if not len(known):
        return np.full((resamples, n), np.nan)
    by_cluster = known[np.argsort(labels[known], kind="stable")]
    sizes = np.bincount(labels[known], minlength=labels.max() + 1)
    first = np.cumsum(sizes) - sizes
    source = rng.choice(np.flatnonzero(sizes), size=(resamples, len(sizes)))[:, labels]
    return residuals[by_cluster[first[source] + np.floor(rng.random((resamples, n)) * sizes[source]).astype(int)]]
