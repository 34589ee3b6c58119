"""A batched Newton method: many small fits of one law at once, differing in their starts or in their weights.

A fit has five to seven coefficients and a few hundred runs, so that the cost of a bootstrap is the interpreter's, not
the arithmetic's: all resamples take their steps together. The same code runs the several starts of a single fit.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from peerscale.laws.results import Array, FitStatus

MAX_ITERATIONS = 1000
TOLERANCE = 1e-12
"""Relative decrease of the objective, predicted by its quadratic model, at which a member has converged."""
MAX_STEP = 2.0
"""Longest step; coordinates are logarithms and exponents of centred data, so that 2 is far."""
CHUNK = 64
"""Members solved together: few enough for the cache, and for BLAS not to start threads, which are 4x slower here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Coordinates:
    """How a law's coefficients in raw units follow from the solver's coordinates, which are centred and scale-free."""

    names: tuple[str, ...]
    """Of the coefficients, in the order of the coordinates."""
    is_log: np.ndarray
    """(coordinates,), bool: which coefficients are the exponentials of theirs."""
    to_raw: Array
    """(coordinates, coordinates): undoes the centring; coefficients are (the exponentials of) to_raw @ point."""

    def coefficients(self, points: Array) -> dict[str, Array]:
        """Raw coefficients by name from points (..., coordinates)."""
        raw = points @ self.to_raw.T
        raw = np.where(self.is_log, np.exp(np.where(self.is_log, raw, 0)), raw)
        return {name: raw[..., i] for i, name in enumerate(self.names)}


class Problem(Protocol):
    """An objective over coordinates `points` (members, coordinates); `members` index its weights (members, runs)."""

    def value(self, points: Array, members: np.ndarray) -> Array:
        """Objective per member, (members,)."""
        ...

    def derivatives(self, points: Array, members: np.ndarray) -> tuple[Array, Array]:
        """Gradient (members, p) and Hessian, or its Gauss-Newton part, (members, p, p)."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Solution:
    """Where each member ended."""

    points: Array
    """(members, coordinates)."""
    values: Array
    """(members,); NaN never: a member whose start cannot be evaluated has inf."""
    at_bound: np.ndarray
    """(members, coordinates), bool."""
    failed: np.ndarray
    """(members,), bool: not finite, or out of iterations."""

    def best(self) -> int:
        """The member with the lowest objective. Optimisers' own flags are no guide: tight tolerances often end with
        a failure flag at the true optimum, and loose ones with success far from it."""
        return int(np.argmin(self.values))


def minimise(problem: Problem, starts: Array, lower: Array, upper: Array) -> Solution:
    """Minimise `problem` from every row of `starts` within the box `lower`..`upper`.

    Damped Newton with the Hessian's eigenvalues replaced by their absolute values (Dauphin et al. 2014, saddle-free
    Newton), which descends on the non-convex parts too; coordinates pressed against a bound are held there.
    """
    solutions = [
        _minimise(problem, np.clip(starts[i : i + CHUNK], lower, upper), lower, upper, i)
        for i in range(0, len(starts), CHUNK)
    ]
    points, values, failed = (np.concatenate(parts) for parts in zip(*solutions, strict=True))
    at_bound = (points <= lower) | (points >= upper)
    return Solution(points=points, values=values, at_bound=at_bound, failed=failed)


def _minimise(problem: Problem, points: Array, lower: Array, upper: Array, first: int) -> tuple[Array, Array, Array]:
    members = first + np.arange(len(points))
    values = problem.value(points, members)
    values[~np.isfinite(values)] = np.inf
    gradients, hessians = problem.derivatives(points, members)
    damping = np.full(len(points), 1e-2)
    failed = ~np.isfinite(values)
    active = np.flatnonzero(~failed)
    for _ in range(MAX_ITERATIONS):
        if not len(active):
            break
        step, predicted = _newton_step(
            points[active], gradients[active], hessians[active], damping[active], lower, upper
        )
        trial = np.clip(points[active] + step, lower, upper)
        trial_values = problem.value(trial, members[active])
        improved = trial_values < values[active]  # False where not finite
        better = active[improved]
        points[better], values[better] = trial[improved], trial_values[improved]
        gradients[better], hessians[better] = problem.derivatives(points[better], members[better])
        damping[better] = np.maximum(damping[better] / 5, 1e-12)
        damping[active[~improved]] *= 4
        # Damping this large means that rounding alone keeps the objective from falling.
        done = (predicted <= TOLERANCE * values[active]) | (damping[active] > 1e8)
        active = active[~done]
    failed[active] = True
    return points, values, failed


def _newton_step(
    points: Array, gradients: Array, hessians: Array, damping: Array, lower: Array, upper: Array
) -> tuple[Array, Array]:
    """Damped step per member and the decrease that the quadratic model predicts for it."""
    held = ((points <= lower) & (gradients > 0)) | ((points >= upper) & (gradients < 0))
    free = ~held
    gradients = np.where(free, gradients, 0.0)
    hessians = np.where(free[:, :, None] & free[:, None, :], hessians, 0.0)
    eigenvalues, vectors = np.linalg.eigh(hessians)
    curvature = np.abs(eigenvalues)
    curvature += damping[:, None] * curvature.max(axis=1, keepdims=True) + np.finfo(float).tiny
    along = np.einsum("rij,ri->rj", vectors, gradients)
    step = -np.einsum("rij,rj->ri", vectors, along / curvature)
    length = np.linalg.norm(step, axis=1, keepdims=True)
    step *= np.minimum(1.0, MAX_STEP / np.maximum(length, np.finfo(float).tiny))
    return step, np.sum(along**2 / curvature, axis=1)


def diagnose(coordinates: Coordinates, jacobian: Array, residuals: Array, point: Array, at_bound: Array) -> FitStatus:
    """Status of a fit from its geometry at the optimum.

    A coefficient counts as undetermined when its standard error exceeds its own size, for those that are logarithms
    when that of the logarithm exceeds 1. The errors are Gauss-Newton's, s^2 (J'J)^-1, s^2 = sum of squares / (n - p).

    Args:
        coordinates: what the coordinates mean.
        jacobian: of the residuals, (runs, coordinates).
        residuals: (runs,).
        point: (coordinates,).
        at_bound: (coordinates,), bool.
    """
    n, p = jacobian.shape
    if at_bound.any():
        return FitStatus.AT_BOUND
    norms = np.linalg.norm(jacobian, axis=0)
    if not (norms > 0).all():
        return FitStatus.NOT_IDENTIFIABLE
    _, singular, rotation = np.linalg.svd(jacobian / norms, full_matrices=False)
    if singular[-1] < 1e-7 * singular[0] or len(singular) < p:
        return FitStatus.NOT_IDENTIFIABLE
    if n <= p:
        return FitStatus.TOO_FEW_POINTS
    scale = np.sqrt(np.sum(residuals**2) / (n - p))
    errors = scale * np.linalg.norm((rotation / singular[:, None] / norms) @ coordinates.to_raw.T, axis=0)
    sizes = np.where(coordinates.is_log, 1.0, np.abs(coordinates.to_raw @ point))
    return FitStatus.NOT_IDENTIFIABLE if (errors > sizes).any() else FitStatus.CONVERGED
