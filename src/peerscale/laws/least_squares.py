"""Least squares and Huber fits of a law to the losses of runs, by SciPy's `least_squares` from several starts.

Most laws here are sums of power laws, L = sum_k s_k prod_v v^(-exponent), with positive sizes s_k. The coordinates are
the exponents and the logarithms of the sizes, and the logarithms of the variables are centred, so that no coordinate is
large and the units of the table do not matter.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from joblib import Parallel, delayed
from scipy.optimize import least_squares, nnls

from peerscale.laws.linear_fit import Array, LinearFit

Powers = Mapping[str, Mapping[str, Array]]
"""Name of the size -> name of the exponent -> logarithm of the variable (runs,): {"A": {"alpha": log_n}, "E": {}} is
A / N^alpha + E. An exponent may occur in several powers."""

EXPONENT_RANGE = (0.01, 3.0)
SIZE_RANGE = (-12.0, 5.0)
"""Range of log(size of a power at the centre of the data / median loss)."""
AT_BOUND = 1e-3
"""Distance from a bound within which a coordinate counts as being on it: the search ends shortly before one."""
TOLERANCE = 1e-10
"""Relative changes of objective and coordinates at which a fit has converged: at SciPy's defaults fits of a law stop
early."""
MAX_EVALUATIONS = 1000
WORTH_PROCESSES = 500
"""Number of refits that take longer than to start a process on every core."""


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
class Optimum:
    """Where one fit ended."""

    point: Array
    """Coordinates (p,)."""
    value: float
    """The objective."""
    at_bound: bool
    failed: bool
    """Whether it did not converge."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """The fit of a law to the losses of runs."""

    names: tuple[str, ...]
    """Names of the coefficients, in the order of the coordinates."""
    to_raw: Array
    """(p, p): undoes the centring; coefficients are to_raw @ point, or its exponential where `is_log`."""
    is_log: Array
    """(p,), bool: which coordinates are logarithms of their coefficients."""
    bounds: tuple[Array, Array]
    """Lowest and highest coordinates, (p,) each."""
    starts: Array
    """(starts, p)."""
    law: Callable[[Array], tuple[Array, Array]]
    """From a point (p,) to the losses (runs,) and their Jacobian (runs, p)."""
    loss: Array
    """(runs,)."""
    objective: Objective
    delta: float = 1.0

    def coefficients(self, points: Array) -> dict[str, Array]:
        """Raw coefficients by name from points (..., p)."""
        raw = points @ self.to_raw.T
        raw[..., self.is_log] = np.exp(raw[..., self.is_log])
        return {name: raw[..., i] for i, name in enumerate(self.names)}

    def predict(self, point: Array) -> Array:
        """Losses (runs,)."""
        return self.law(point)[0]

    def residuals(self, point: Array) -> Array:
        """(runs,)."""
        predicted = self.predict(point)
        return np.log(predicted / self.loss) if self.objective.logarithmic else predicted - self.loss

    def jacobian(self, point: Array) -> Array:
        """Derivatives of the residuals, (runs, p)."""
        predicted, jacobian = self.law(point)
        return jacobian / predicted[:, None] if self.objective.logarithmic else jacobian

    def minimise(self, start: Array, rows: Array | slice = slice(None)) -> Optimum:
        """The optimum near `start` (p,) of the runs `rows`, which may occur several times.

        The search runs over sizes instead of their logarithms: that of a vanishing size goes to minus infinity, along a
        valley in which a search would take hundreds of steps.
        """
        lower, upper = self.bounds
        with np.errstate(divide="ignore", invalid="ignore"):  # its trust region divides by zero where a fit is exact
            found = least_squares(
                lambda sizes: self.residuals(self._logs(sizes))[rows],
                self._sizes(np.clip(start, lower, upper)),
                lambda sizes: self.jacobian(self._logs(sizes))[rows] / np.where(self.is_log, sizes, 1.0),
                bounds=(self._sizes(lower), self._sizes(upper)), x_scale="jac",
                loss="huber" if self.objective.robust else "linear", f_scale=self.delta,
                ftol=TOLERANCE, xtol=TOLERANCE, gtol=None, max_nfev=MAX_EVALUATIONS,
            )  # fmt: skip
        point = self._logs(found.x)
        return Optimum(
            point=point, value=float(found.cost) * (1 if self.objective.robust else 2),
            at_bound=bool(np.any((point < lower + AT_BOUND) | (point > upper - AT_BOUND))), failed=found.status == 0,
        )  # fmt: skip

    def _sizes(self, point: Array) -> Array:
        return np.where(self.is_log, np.exp(np.where(self.is_log, point, 0.0)), point)

    def _logs(self, sizes: Array) -> Array:
        return np.where(self.is_log, np.log(np.where(self.is_log, sizes, 1.0)), sizes)

    def best(self) -> Optimum:
        """The lowest optimum from all starts.

        Flags of optimisers are not reliable: with tight tolerances they often report a failure at the true optimum, and
        with loose ones success far from it.
        """
        return min(map(self.minimise, self.starts), key=lambda found: found.value)

    def refit(self, start: Array, counts: Array) -> list[Optimum]:
        """The optimum near `start` (p,) for each resample; `counts` (resamples, runs) has how often each run counts."""
        resamples = (np.repeat(np.arange(len(self.loss)), times) for times in counts)
        jobs = -1 if len(counts) >= WORTH_PROCESSES else 1
        return Parallel(n_jobs=jobs)(delayed(self.minimise)(start, rows) for rows in resamples)

    def status(self, found: Optimum) -> FitStatus:
        """Whether the data determine the coefficients, from the errors of the law made linear at its optimum.

        A coefficient is not identifiable if its standard error exceeds its value or, if its coordinate is a logarithm,
        if the standard error of the logarithm exceeds 1.
        """
        if found.at_bound:
            return FitStatus.AT_BOUND
        residuals, jacobian = self.residuals(found.point), self.jacobian(found.point)
        norms = np.linalg.norm(jacobian, axis=0)
        if not (norms > 0).all():
            return FitStatus.NOT_IDENTIFIABLE
        linear = LinearFit(design=jacobian / norms, values=residuals)
        if not linear.determined:
            return FitStatus.NOT_IDENTIFIABLE
        if not linear.df:
            return FitStatus.TOO_FEW_POINTS
        to_raw = self.to_raw / norms
        variances = np.diag(to_raw @ linear.inverse @ to_raw.T) * np.sum(residuals**2) / linear.df
        sizes = np.where(self.is_log, 1.0, np.abs(self.to_raw @ found.point))
        return FitStatus.NOT_IDENTIFIABLE if (variances > sizes**2).any() else FitStatus.CONVERGED


def power_problem(
    powers: Powers, loss: Array, *, objective: Objective | str, delta: float, start_exponents: Sequence[float]
) -> Problem:
    """The fit of a sum of powers; the coordinates are the logarithms of the sizes, then the exponents.

    The starts are all combinations of `start_exponents`. For given exponents the law is linear in the sizes, which
    follow by non-negative least squares on the loss (variable projection), so that starts do not depend on units.
    """
    names = list(dict.fromkeys((*powers, *(name for variables in powers.values() for name in variables))))
    is_log = np.arange(len(names)) < len(powers)
    terms = np.zeros((len(powers), len(loss), len(names)))  # every power is exp(term @ point)
    to_raw = np.eye(len(names))
    for k, variables in enumerate(powers.values()):
        terms[k, :, k] = 1.0
        for name, log_variable in variables.items():
            centre = log_variable.mean()
            terms[k, :, names.index(name)] = centre - log_variable
            to_raw[k, names.index(name)] = centre

    def law(point: Array) -> tuple[Array, Array]:
        each = np.exp(terms @ point)
        return each.sum(axis=0), np.einsum("kr,krp->rp", each, terms)

    starts = []
    for exponents in itertools.product(start_exponents, repeat=int(np.sum(~is_log))):
        sizes, _ = nnls(np.exp(terms[:, :, ~is_log] @ np.array(exponents)).T, loss)
        starts.append([*np.log(np.maximum(sizes, 1e-3 * np.median(loss))), *exponents])
    lower, upper = (
        np.where(is_log, np.log(np.median(loss)) + size, exponent)
        for size, exponent in zip(SIZE_RANGE, EXPONENT_RANGE, strict=True)
    )
    return Problem(
        names=tuple(names), to_raw=to_raw, is_log=is_log, bounds=(lower, upper), starts=np.array(starts), law=law,
        loss=loss, objective=Objective(objective), delta=delta,
    )  # fmt: skip
