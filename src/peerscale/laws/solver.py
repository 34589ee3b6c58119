"""A batched Newton method: many small fits of one law at once, differing in their starts or in their runs' weights.

A fit has five to seven coefficients and a few hundred runs, so that the cost of a bootstrap is the interpreter's, not
the arithmetic's: all resamples take their steps together. The same code runs the several starts of a single fit.
"""

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from peerscale.laws.objective import Coordinates, Problem
from peerscale.laws.results import Array, FitStatus

MAX_ITERATIONS = 1000
TOLERANCE = 1e-12
"""Relative decrease of the objective, predicted by its quadratic model, at which a member has converged."""
EXACT = 1e-26
"""Decrease not worth a step, for fits without residuals."""
PATIENCE, STALL = 25, 1e-7
"""A member whose objective has fallen by less than this share of itself in so many iterations has converged too: along
a valley that the data leave flat."""
MAX_STEP = 2.0
"""Longest step; coordinates are logarithms and exponents of centred data, so that 2 is far."""
CHUNK = 64
"""Members solved together: few enough for the cache, and for BLAS not to start threads, which are 4x slower here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Solution:
    """Where each member ended."""

    points: Array
    """(R, p)."""
    values: Array
    """(R,); inf for a member that could not be evaluated."""
    at_bound: Array
    """(R,), bool: some coordinate ended on a bound."""
    failed: Array
    """(R,), bool: not finite, or out of iterations."""


def solve(problem: Problem) -> tuple[Array, float, FitStatus]:
    """The best optimum over the problem's starts: its point (p,), objective and status.

    Best by objective. Optimisers' flags are no guide: tight tolerances often end with a failure flag at the true
    optimum, loose ones with success far from it.
    """
    solution = minimise(problem, problem.starts)
    best = int(np.argmin(solution.values))
    point, value = solution.points[best], float(solution.values[best])
    if solution.at_bound[best]:
        return point, value, FitStatus.AT_BOUND
    _, residuals, jacobian, _ = problem.linearised(point[None])
    return point, value, diagnose(problem.coordinates, point, residuals[0], jacobian[0].T)


def minimise(problem: Problem, starts: Array, weights: Array | None = None) -> Solution:
    """Minimise within the box of the problem's coordinates.

    Damped Newton with the Hessian's eigenvalues replaced by their absolute values (Dauphin et al. 2014, saddle-free
    Newton), which descends on the non-convex parts too; coordinates pressed against a bound are held there.

    Args:
        problem: law, losses and penalty.
        starts: (R, p), or (p,) for all.
        weights: (R, runs), how often each run counts; None counts every run once.
    """
    lower, upper = problem.coordinates.lower, problem.coordinates.upper
    if weights is None:
        weights = np.ones((len(starts), len(problem.loss)))
    points = np.clip(np.broadcast_to(starts, (len(weights), len(lower))), lower, upper)
    values, failed = np.empty(len(points)), np.empty(len(points), bool)

    def solve_part(first: int) -> None:
        part = slice(first, first + CHUNK)
        points[part], values[part], failed[part] = _minimise(problem, points[part], weights[part])

    with ThreadPoolExecutor(os.cpu_count()) as cores:  # NumPy lets go of the interpreter; parts do not depend on it
        deque(cores.map(solve_part, range(0, len(points), CHUNK)), maxlen=0)
    at_bound = np.any((points <= lower) | (points >= upper), axis=1)
    return Solution(points=points, values=values, at_bound=at_bound, failed=failed)


def _minimise(problem: Problem, points: Array, weights: Array) -> tuple[Array, Array, Array]:
    lower, upper = problem.coordinates.lower, problem.coordinates.upper
    values = problem.value(points, weights)
    failed = ~np.isfinite(values)
    values[failed] = np.inf
    gradients, hessians = problem.derivatives(points, weights)
    damping = np.full(len(points), 1e-2)
    active = np.flatnonzero(~failed)
    before = values.copy()
    for iteration in range(1, MAX_ITERATIONS + 1):
        if not len(active):
            break
        at = points[active]
        held = ((at <= lower) & (gradients[active] > 0)) | ((at >= upper) & (gradients[active] < 0))
        step, predicted = _newton_step(gradients[active], hessians[active], damping[active], ~held)
        trial = np.clip(at + step, lower, upper)
        trial_values = problem.value(trial, weights[active])
        improved = trial_values < values[active]  # False where not finite
        better = active[improved]
        points[better], values[better] = trial[improved], trial_values[improved]
        gradients[better], hessians[better] = problem.derivatives(points[better], weights[better])
        damping[better] = np.maximum(damping[better] / 5, 1e-12)
        damping[active[~improved]] *= 4
        # Damping this large means that rounding alone keeps the objective from falling.
        done = (predicted <= TOLERANCE * values[active] + EXACT) | (damping[active] > 1e8)
        if iteration % PATIENCE == 0:
            done |= values[active] >= (1 - STALL) * before[active]
            before = values.copy()
        active = active[~done]
    failed[active] = True
    return points, values, failed


def _newton_step(gradients: Array, hessians: Array, damping: Array, free: Array) -> tuple[Array, Array]:
    """Damped step per member (R, p) in its free coordinates, and the decrease that its quadratic model predicts."""
    gradients = np.where(free, gradients, 0.0)
    hessians = np.where(free[:, :, None] & free[:, None, :], hessians, 0.0)
    eigenvalues, vectors = np.linalg.eigh(hessians)
    bend = np.abs(eigenvalues)
    bend += damping[:, None] * bend.max(axis=1, keepdims=True) + np.finfo(float).tiny
    along = np.einsum("rij,ri->rj", vectors, gradients)
    step = -np.einsum("rij,rj->ri", vectors, along / bend)
    length = np.linalg.norm(step, axis=1, keepdims=True)
    return step * np.minimum(1.0, MAX_STEP / np.maximum(length, 1e-300)), np.sum(along**2 / bend, axis=1)


def diagnose(coordinates: Coordinates, point: Array, residuals: Array, jacobian: Array) -> FitStatus:
    """Status of a fit inside its bounds, from the geometry at the optimum.

    A coefficient counts as undetermined when its standard error exceeds its own size; one that is a logarithm here,
    when that of the logarithm exceeds 1. The errors are Gauss-Newton's, s^2 (J'J)^-1, s^2 = sum of squares / (n - p),
    from the residuals (runs,) and their `jacobian` J (runs, p) at `point` (p,).
    """
    n, p = jacobian.shape
    norms = np.linalg.norm(jacobian, axis=0)
    if n < p or not (norms > 0).all():
        return FitStatus.NOT_IDENTIFIABLE
    _, singular, rotation = np.linalg.svd(jacobian / norms, full_matrices=False)
    if singular[-1] < 1e-7 * singular[0]:
        return FitStatus.NOT_IDENTIFIABLE
    if n == p:
        return FitStatus.TOO_FEW_POINTS
    scale = np.sqrt(np.sum(residuals**2) / (n - p))
    errors = scale * np.linalg.norm((rotation / singular[:, None] / norms) @ coordinates.to_raw.T, axis=0)
    sizes = np.where(coordinates.is_log, 1.0, np.abs(coordinates.to_raw @ point))
    return FitStatus.NOT_IDENTIFIABLE if (errors > sizes).any() else FitStatus.CONVERGED
