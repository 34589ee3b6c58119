"""Least squares and Huber fits of a law to the losses of runs; many fits at once, from several starts or resamples.

All fits of a batch take their Newton steps together. A fit has five to seven coefficients and a few hundred runs, so
that one fit at a time would mostly spend time in the interpreter. SciPy's `least_squares(loss="huber")` minimises the
same objective (its cost is the sum below, with f_scale = delta) and finds the same optima, but it solves one problem at
a time and can only use several cores through additional processes. It takes about ten times as long for 4,000 refits of
240 runs, and every law needs two sets of refits: for its coefficients and for its held-out runs.

Most laws here are sums of power laws, L = sum_k s_k prod_v v^(-exponent), with positive sizes s_k. The coordinates
theta are the exponents and the logarithms of the sizes, so every power is exp(M_k . theta), with exact and cheap
derivatives. The logarithms of the variables in M are centred, so that no coordinate is large and units do not matter.
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
"""Name of the size -> name of the exponent -> logarithm of the variable (runs,): {"A": {"alpha": log_n}, "E": {}} is
A / N^alpha + E. An exponent may occur in several powers."""
Curvature = Callable[[Array], Array]
"""From a factor per run (R, runs) to the sum over runs of factor * second derivatives of the prediction, (R, p, p)."""

EXPONENT_RANGE = (0.01, 3.0)
SIZE_RANGE = (-12.0, 5.0)
"""Range of log(size of a power at the centre of the data / median loss)."""
STEP = 1e-6
"""Step of numerical derivatives."""
MAX_ITERATIONS = 1000
TOLERANCE = 1e-12
"""A fit has converged when the predicted relative decrease of its objective is below this."""
EXACT = 1e-26
"""Absolute decrease that is added to this threshold, for fits without residuals."""
PATIENCE, STALL = 25, 1e-7
"""A fit has also converged if its objective fell by less than a share `STALL` in `PATIENCE` iterations: it moves along
a valley that the data leave flat."""
MAX_STEP = 2.0
"""Longest step; coordinates are logarithms and exponents of centred data, so 2 is a long way."""
CHUNK = 64
"""Fits solved together: few enough for the cache and for BLAS not to start threads, which are 4x slower here."""


class FitStatus(StrEnum):
    """How far a fit's coefficients can be trusted; determined from the fit itself, never from an optimiser's flag."""

    CONVERGED = "converged"
    """The best optimum from several starts is inside the bounds, and the data determine every coefficient."""
    AT_BOUND = "at_bound"
    """A coefficient ended on a bound of its range, such as an irreducible loss of zero."""
    NOT_IDENTIFIABLE = "not_identifiable"
    """The uncertainty of a coefficient exceeds its value: publish predictions, not coefficients."""
    TOO_FEW_POINTS = "too_few_points"
    """There are not more points than coefficients (isoFLOP: fewer than three usable budgets)."""


class Objective(StrEnum):
    """Penalty on residuals, always summed over runs, since with a mean optimisers stop early.

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
    """Conversion from the solver's coordinates, which are centred and bounded, to coefficients in raw units."""

    names: tuple[str, ...]
    """Names of the coefficients, in the order of the coordinates."""
    is_log: Array
    """(p,), bool: which coordinates are logarithms of their coefficients."""
    to_raw: Array
    """(p, p): undoes the centring; coefficients are to_raw @ point, or its exponential where `is_log`."""
    lower: Array
    upper: Array
    """`lower` and `upper` (p,): bounds of the coordinates."""

    def coefficients(self, points: Array) -> dict[str, Array]:
        """Raw coefficients by name from points (..., p)."""
        raw = points @ self.to_raw.T
        raw[..., self.is_log] = np.exp(raw[..., self.is_log])
        return {name: raw[..., i] for i, name in enumerate(self.names)}


@dataclass(frozen=True, slots=True)
class PowerSum:
    """A sum of power laws, evaluated at the runs of a table, as a function of the solver's points (R, p)."""

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
    """A law given by a function `predict`, with a numerical Jacobian; for laws with complicated derivatives."""

    form: type
    coordinates: Coordinates
    variables: Sequence[Array]
    """Arguments of `predict`, (runs,) each."""

    def predict(self, points: Array) -> Array:
        """Losses (R, runs)."""
        with np.errstate(all="ignore"):
            return self.form(**self.coordinates.coefficients(points[..., None, :])).predict(*self.variables)

    def derivatives(self, points: Array) -> tuple[Array, Array, None]:
        """Losses and, by central differences, their Jacobian; without curvature, steps are Gauss-Newton steps."""
        steps = STEP * np.eye(points.shape[1])
        ahead, behind = (self.predict(points[:, None, :] + sign * steps) for sign in (1, -1))
        return self.predict(points), (ahead - behind) / (2 * STEP), None


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """The fit of a law to the losses of runs, as the solver sees it."""

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
        """Objective (R,) at points (R, p), with weights (R, runs) of the runs."""
        with np.errstate(all="ignore"):
            residuals = self.residuals(self.law.predict(points))
            size = np.abs(residuals)
            inner = np.minimum(size, self.delta)
            penalty = inner * (size - inner / 2) if self.objective.robust else residuals**2
            return np.sum(penalty * weights, axis=1)

    def linearised(self, points: Array) -> tuple[Array, Array, Array, Curvature | None]:
        """Losses and residuals (R, runs), Jacobian of the residuals (R, p, runs), and curvature of the losses."""
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
    """The fit of a sum of powers; the coordinates are the logarithms of the sizes, then the exponents.

    The starts are all combinations of `start_exponents`. For given exponents the law is linear in the sizes, which
    follow by non-negative least squares on the loss (variable projection), so that starts do not depend on units.
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
    """The end points of all fits of a batch."""

    points: Array
    """(R, p)."""
    values: Array
    """Objectives (R,); inf if a fit could not be evaluated."""
    at_bound: Array
    """(R,), bool: whether a coordinate ended on a bound."""
    failed: Array
    """(R,), bool: not finite, or no convergence within the iterations."""


def solve(problem: Problem) -> tuple[Array, float, FitStatus]:
    """The best optimum from all starts of the problem: its point (p,), objective and status.

    The best one has the lowest objective. Flags of optimisers are not reliable: with tight tolerances they often report
    a failure at the true optimum, and with loose ones success far from it.
    """
    solution = minimise(problem, problem.starts)
    best = int(np.argmin(solution.values))
    point, value = solution.points[best], float(solution.values[best])
    if solution.at_bound[best]:
        return point, value, FitStatus.AT_BOUND
    _, residuals, jacobian, _ = problem.linearised(point[None])
    return point, value, diagnose(problem.coordinates, point, residuals[0], jacobian[0].T)


def minimise(problem: Problem, starts: Array, weights: Array | None = None) -> Solution:
    """Minimise within the bounds of the problem's coordinates.

    Damped Newton steps with absolute values of the Hessian's eigenvalues (saddle-free Newton, Dauphin et al. 2014),
    which also descend where the objective is not convex; coordinates pushed against a bound are held there.

    Args:
        problem: law, losses and penalty.
        starts: (R, p), or (p,) for all fits.
        weights: (R, runs), how often each run counts; None: every run counts once.
    """
    lower, upper = problem.coordinates.lower, problem.coordinates.upper
    if weights is None:
        weights = np.ones((len(starts), len(problem.loss)))
    points = np.clip(np.broadcast_to(starts, (len(weights), len(lower))), lower, upper)
    values, failed = np.empty(len(points)), np.empty(len(points), bool)

    def solve_part(first: int) -> None:
        part = slice(first, first + CHUNK)
        points[part], values[part], failed[part] = _minimise(problem, points[part], weights[part])

    with ThreadPoolExecutor(
        os.cpu_count()
    ) as cores:  # NumPy releases the GIL; results do not depend on the number of threads
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
        improved = trial_values < values[active]  # False if not finite
        better = active[improved]
        points[better], values[better] = trial[improved], trial_values[improved]
        gradients[better], hessians[better] = problem.derivatives(points[better], weights[better])
        damping[better] = np.maximum(damping[better] / 5, 1e-12)
        damping[active[~improved]] *= 4
        # With such a large damping, only rounding keeps the objective from falling.
        done = (predicted <= TOLERANCE * values[active] + EXACT) | (damping[active] > 1e8)
        if iteration % PATIENCE == 0:
            done |= values[active] >= (1 - STALL) * before[active]
            before = values.copy()
        active = active[~done]
    failed[active] = True
    return points, values, failed


def _newton_step(gradients: Array, hessians: Array, damping: Array, free: Array) -> tuple[Array, Array]:
    """The damped step of each fit (R, p) in its free coordinates, and the decrease predicted by the quadratic model."""
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
    """Status of a fit inside its bounds, from the Jacobian at the optimum.

    A coefficient is not identifiable if its standard error exceeds its value or, if its coordinate is a logarithm, if
    the standard error of the logarithm exceeds 1. The errors are Gauss-Newton's, s^2 (J'J)^-1 with s^2 = sum of squares
    / (n - p), from the residuals (runs,) and their `jacobian` J (runs, p) at `point` (p,).
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
