"""What a fit minimises: a penalty on residuals summed over runs, as many fits at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np

from peerscale.laws.results import Array

STEP = 1e-6
"""Of numerical derivatives."""


class Objective(StrEnum):
    """Penalty on residuals, always summed over runs: a mean makes optimisers stop early.

    Huber(r) = r^2 / 2 for |r| <= delta, else delta (|r| - delta / 2); the squared objectives sum r^2.
    """

    HUBER_LOG = "huber-log"
    """Huber of the log residual, log prediction - log loss (Hoffmann et al. 2022, equation 3)."""
    HUBER = "huber"
    """Huber of the residual."""
    MSE_LOG = "mse-log"
    """Squared log residual."""
    MSE = "mse"
    """Squared residual."""

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


class Problem(Protocol):
    """Fits of one law to one set of runs that differ in their points (R, p) only, or in the runs' weights too."""

    def residuals(self, points: Array, members: Array) -> Array:
        """Residuals (R, runs) at points (R, p) of the numbered members (R,)."""
        ...

    def derivatives(self, points: Array, members: Array) -> tuple[Array, Array, Callable[[Array], Array] | None]:
        """Residuals, their Jacobian (R, p, runs), and the curvature.

        The curvature turns slopes of the penalty (R, runs) into the sum over runs of slope * second derivative of the
        residual, (R, p, p). None leaves that out: Gauss-Newton, reweighted.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Predicted:
    """A law as a `Problem` by its own `predict`, with a numerical Jacobian: for laws whose derivatives are long."""

    form: type
    coordinates: Coordinates
    variables: Sequence[Array]
    """Arguments of `predict`, (runs,) each."""
    loss: Array
    """(runs,)."""
    logarithmic: bool

    def residuals(self, points: Array, members: Array) -> Array:
        """Residuals (R, runs) at points (R, p)."""
        with np.errstate(all="ignore"):
            loss = self.form(**self.coordinates.coefficients(points[..., None, :])).predict(*self.variables)
            return np.log(loss / self.loss) if self.logarithmic else loss - self.loss

    def derivatives(self, points: Array, members: Array) -> tuple[Array, Array, None]:
        """Residuals and Jacobian by central differences; coordinates are logarithms and exponents."""
        steps = STEP * np.eye(points.shape[1])
        ahead, behind = (self.residuals(points[:, None, :] + sign * steps, members) for sign in (1, -1))
        return self.residuals(points, members), (ahead - behind) / (2 * STEP), None


@dataclass(frozen=True, kw_only=True, slots=True)
class Misfit:
    """The objective over a problem: what the solver sees."""

    problem: Problem
    objective: Objective
    delta: float = np.inf
    weights: Array | None = None
    """(all members, runs); None counts every run once."""

    def value(self, points: Array, members: Array) -> Array:
        """Objective per member, (R,)."""
        with np.errstate(over="ignore", invalid="ignore"):
            residuals = self.problem.residuals(points, members)
            size = np.abs(residuals)
            inner = np.minimum(size, self.delta)
            penalty = inner * (size - inner / 2) if self.objective.robust else residuals**2
            return np.sum(penalty if self.weights is None else penalty * self.weights[members], axis=1)

    def derivatives(self, points: Array, members: Array) -> tuple[Array, Array]:
        """Gradient (R, p) and Hessian (R, p, p)."""
        residuals, jacobian, curvature = self.problem.derivatives(points, members)
        if self.objective.robust:
            slope = np.clip(residuals, -self.delta, self.delta)
            size = np.abs(residuals)
            # Without curvature the linear parts would have no Hessian at all: take the square touching them from above.
            bend = (
                self.delta / np.maximum(size, self.delta) if curvature is None else (size <= self.delta).astype(float)
            )
        else:
            slope, bend = 2 * residuals, np.full_like(residuals, 2.0)
        if self.weights is not None:
            slope, bend = slope * self.weights[members], bend * self.weights[members]
        gradient = (jacobian @ slope[:, :, None])[:, :, 0]
        hessian = (jacobian * bend[:, None, :]) @ jacobian.transpose(0, 2, 1)
        return gradient, hessian if curvature is None else hessian + curvature(slope)
