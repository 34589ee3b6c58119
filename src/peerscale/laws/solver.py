"""Least squares and Huber fits of a law to the losses of runs, many at once: from several starts, or of resampled runs.

All members of a batch take their Newton steps together. A fit has five to seven coefficients and a few hundred runs, so
one at a time costs the interpreter's time, not the arithmetic's. SciPy's `least_squares(loss="huber")` minimises the
same objective (its cost is the sum below, with f_scale = delta) and finds the same optima, but it solves one problem at
a time, and only processes, which have to be started first, let it use several cores. It needs some ten times as long
for 4,000 refits of 240 runs, and every fit refits twice as often: for its coefficients and for its held-out runs.

Most laws here are sums of power laws, L = sum_k s_k prod_v v^(-exponent), with positive sizes s_k. With the logarithms
of the sizes and the exponents as coordinates theta every power is exp(M_k . theta), whose derivatives are exact and
cheap. The logarithms of the variables in M are centred, so that no coordinate is large and no unit matters.
"""

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from scipy.optimize import nnls

Array = np.ndarray
Number = float | np.ndarray
"""A coefficient or prediction, or an array of bootstrap draws of it."""
Powers = Mapping[str, Mapping[str, Array]]
"""Size's name -> exponent's name -> logarithm of the variable (runs,): {"A": {"alpha": log_n}, "E": {}} is
A / N^alpha + E. An exponent may occur in several powers."""
Curvature = Callable[[Array], Array]
"""From a factor per run (R, runs) to the sum over runs of factor * second derivative of the prediction, (R, p, p)."""

EXPONENT_RANGE = (0.01, 3.0)
SIZE_RANGE = (-12.0, 5.0)
"""Range of log(size of a power at the centre of the data / median loss)."""
STEP = 1e-6
"""Of numerical derivatives."""
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


class FitStatus(StrEnum):
    """What a fit's coefficients can be used for; decided from the fit itself, never from an optimiser's flag."""

    CONVERGED = "converged"
    """The best optimum of several starts, inside the bounds, every coefficient determined by the data."""
    AT_BOUND = "at_bound"
    """A coefficient ended on the edge of its range, such as an irreducible loss of zero."""
    NOT_IDENTIFIABLE = "not_identifiable"
    """A coefficient is uncertain by more than its own size: publish predictions, not coefficients."""
    TOO_FEW_POINTS = "too_few_points"
    """No more points than coefficients (isoFLOP: fewer than three usable budgets)."""


class Objective(StrEnum):
    """Penalty on residuals, always summed over runs: a mean makes optimisers stop early.

    Huber(r) = r^2 / 2 for |r| <= delta, else delta (|r| - delta / 2); the squared objectives sum r^2. Residuals are
    prediction - loss, or log prediction - log loss. The paper's is huber-log (Hoffmann et al. 2022, equation 3).
    """

    HUBER_LOG = "huber-log"
    HUBER = "huber"
    MSE_LOG = "mse-log"
    MSE = "mse"

    @property
    def logarithmic(self) -> bool:
        """Whether residuals are of log losses."""
        return self in (Objective.HUBER_LOG, Objective.MSE_LOG)

    @property
    def robust(self) -> bool:
        """Whether residuals beyond delta count linearly."""
        return self in (Objective.HUBER_LOG, Objective.HUBER)


@dataclass(frozen=True, kw_only=True, slots=True)
class Coordinates:
    """How a law's coefficients in raw units follow from the solver's coordinates, which are centred and bounded."""

    names: tuple[str, ...]
    """Of the coefficients, in the order of the coordinates."""
    is_log: Array
    """(p,), bool: which coefficients are the exponentials of theirs."""
    to_raw: Array
    """(p, p): undoes the centring; coefficients are (the exponentials of) to_raw @ point."""
    lower: Array
    upper: Array
    """(p,): the box, in coordinates."""

    def coefficients(self, points: Array) -> dict[str, Array]:
        """Raw coefficients by name from points (..., p)."""
        raw = points @ self.to_raw.T
        raw[..., self.is_log] = np.exp(raw[..., self.is_log])
        return {name: raw[..., i] for i, name in enumerate(self.names)}


@dataclass(frozen=True, slots=True)
class PowerSum:
    """A sum of power laws at the runs of one table, as a function of the solver's points (R, p)."""

    terms: Array
    """M, (powers, runs, coordinates)."""

    def powers(self, points: Array) -> Array:
        return np.exp(points @ self.terms.transpose(0, 2, 1))

    def predict(self, points: Array) -> Array:
        """Losses (R, runs)."""
        return self.powers(points).sum(axis=0)

    def derivatives(self, points: Array) -> tuple[Array, Array, Curvature]:
        """Losses, their Jacobian (R, p, runs), and their curvature."""
        powers = self.powers(points)
        jacobian = np.zeros((*points.shape, powers.shape[-1]))
        for power, term in zip(powers, self.terms, strict=True):
            jacobian += power[:, None, :] * term.T

        def curvature(factor: Array) -> Array:
            squares = (self.terms[:, :, :, None] * self.terms[:, :, None, :]).reshape(*self.terms.shape[:2], -1)
            return np.sum((powers * factor) @ squares, axis=0).reshape(*points.shape, points.shape[1])

        return powers.sum(axis=0), jacobian, curvature


@dataclass(frozen=True, kw_only=True, slots=True)
class Numerical:
    """A law by its own `predict`, with a numerical Jacobian: for laws whose derivatives are long."""

    form: type
    coordinates: Coordinates
    variables: Sequence[Array]
    """Arguments of `predict`, (runs,) each."""

    def predict(self, points: Array) -> Array:
        """Losses (R, runs)."""
        with np.errstate(all="ignore"):
            return self.form(**self.coordinates.coefficients(points[..., None, :])).predict(*self.variables)

    def derivatives(self, points: Array) -> tuple[Array, Array, None]:
        """Losses and, by central differences, their Jacobian; without curvature the steps are Gauss-Newton's."""
        steps = STEP * np.eye(points.shape[1])
        ahead, behind = (self.predict(points[:, None, :] + sign * steps) for sign in (1, -1))
        return self.predict(points), (ahead - behind) / (2 * STEP), None


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """The fit of a law to the losses of runs: what the solver sees."""

    law: PowerSum | Numerical
    loss: Array
    """(runs,)."""
    coordinates: Coordinates
    starts: Array
    """(starts, p)."""
    objective: Objective
    delta: float = np.inf

    def residuals(self, predicted: Array) -> Array:
        return np.log(predicted / self.loss) if self.objective.logarithmic else predicted - self.loss

    def value(self, points: Array, weights: Array) -> Array:
        """Objective (R,) at points (R, p), the runs of each counted by its weights (R, runs)."""
        with np.errstate(all="ignore"):
            residuals = self.residuals(self.law.predict(points))
            size = np.abs(residuals)
            inner = np.minimum(size, self.delta)
            penalty = inner * (size - inner / 2) if self.objective.robust else residuals**2
            return np.sum(penalty * weights, axis=1)

    def linearised(self, points: Array) -> tuple[Array, Array, Array, Curvature | None]:
        """Losses and residuals (R, runs), the residuals' Jacobian (R, p, runs), and the losses' curvature."""
        predicted, jacobian, curvature = self.law.derivatives(points)
        if self.objective.logarithmic:
            jacobian = jacobian / predicted[:, None, :]
        return predicted, self.residuals(predicted), jacobian, curvature

    def derivatives(self, points: Array, weights: Array) -> tuple[Array, Array]:
        """Gradient (R, p) and Hessian (R, p, p)."""
        predicted, residuals, jacobian, curvature = self.linearised(points)
        if self.objective.robust:
            slope, bend = np.clip(residuals, -self.delta, self.delta), np.abs(residuals) <= self.delta
        else:
            slope, bend = 2 * residuals, 2.0
        slope, bend = slope * weights, bend * weights
        gradient, transposed = (jacobian @ slope[:, :, None])[:, :, 0], jacobian.transpose(0, 2, 1)
        if curvature is None:
            return gradient, (jacobian * bend[:, None, :]) @ transposed
        if self.objective.logarithmic:  # d^2 log L = d^2 L / L - (d log L)^2
            bend, slope = bend - slope, slope / predicted
        return gradient, (jacobian * bend[:, None, :]) @ transposed + curvature(slope)


def power_problem(
    powers: Powers,
    loss: Array,
    *,
    objective: Objective | str,
    delta: float,
    start_exponents: Sequence[float],
) -> Problem:
    """The fit of a sum of powers; coordinates are the logarithms of the sizes, then the exponents.

    Starts are every combination of `start_exponents`, with the sizes by non-negative least squares on the loss: for
    given exponents the law is linear in them (variable projection), so that no start depends on a unit.
    """
    names = list(dict.fromkeys((*powers, *(name for variables in powers.values() for name in variables))))
    is_log = np.arange(len(names)) < len(powers)
    terms = np.zeros((len(powers), len(loss), len(names)))
    to_raw = np.eye(len(names))
    for k, variables in enumerate(powers.values()):
        terms[k, :, k] = 1.0
        for name, log_variable in variables.items():
            centre = log_variable.mean()
            terms[k, :, names.index(name)] = centre - log_variable
            to_raw[k, names.index(name)] = centre
    starts = []
    for exponents in itertools.product(start_exponents, repeat=int(np.sum(~is_log))):
        sizes, _ = nnls(np.exp(terms[:, :, ~is_log] @ np.array(exponents)).T, loss)
        starts.append([*np.log(np.maximum(sizes, 1e-3 * np.median(loss))), *exponents])
    lower, upper = (
        np.where(is_log, np.log(np.median(loss)) + size, exponent)
        for size, exponent in zip(SIZE_RANGE, EXPONENT_RANGE, strict=True)
    )
    coordinates = Coordinates(names=tuple(names), is_log=is_log, to_raw=to_raw, lower=lower, upper=upper)
    return Problem(
        law=PowerSum(terms), loss=loss, coordinates=coordinates, starts=np.array(starts),
        objective=Objective(objective), delta=delta,
    )  # fmt: skip


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
        list(cores.map(solve_part, range(0, len(points), CHUNK)))
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
