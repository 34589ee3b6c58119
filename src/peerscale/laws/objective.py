"""What a fit minimises: a penalty on the residuals of a law, summed over runs, as many fits at once."""

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


Curvature = Callable[[Array], Array]
"""From a factor per run (R, runs) to the sum over runs of factor * second derivative of the prediction, (R, p, p)."""


class Predictor(Protocol):
    """A law at the runs of one table, as a function of the solver's points (R, p)."""

    def predict(self, points: Array) -> Array:
        """Losses (R, runs)."""
        ...

    def derivatives(self, points: Array) -> tuple[Array, Array, Curvature | None]:
        """Losses, their Jacobian (R, p, runs), and the curvature; None leaves that out: Gauss-Newton, reweighted."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Numerical:
    """A law by its own `predict`, with a numerical Jacobian: for laws whose derivatives are long."""

    form: type
    coordinates: Coordinates
    variables: Sequence[Array]
    """Arguments of `predict`, (runs,) each."""

    def predict(self, points: Array) -> Array:
        with np.errstate(all="ignore"):
            return self.form(**self.coordinates.coefficients(points[..., None, :])).predict(*self.variables)

    def derivatives(self, points: Array) -> tuple[Array, Array, None]:
        """By central differences; coordinates are logarithms and exponents."""
        steps = STEP * np.eye(points.shape[1])
        ahead, behind = (self.predict(points[:, None, :] + sign * steps) for sign in (1, -1))
        return self.predict(points), (ahead - behind) / (2 * STEP), None


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """The fit of a law to the losses of runs: what the solver sees."""

    law: Predictor
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
            slope, size = np.clip(residuals, -self.delta, self.delta), np.abs(residuals)
            # Without curvature the linear parts would have no Hessian at all: take the square touching them from above.
            bend = self.delta / np.maximum(size, self.delta) if curvature is None else size <= self.delta
        else:
            slope, bend = 2 * residuals, 2.0
        slope, bend = slope * weights, bend * weights
        gradient, transposed = (jacobian @ slope[:, :, None])[:, :, 0], jacobian.transpose(0, 2, 1)
        if curvature is None:
            return gradient, (jacobian * bend[:, None, :]) @ transposed
        if self.objective.logarithmic:  # d^2 log L = d^2 L / L - (d log L)^2
            bend, slope = bend - slope, slope / predicted
        return gradient, (jacobian * bend[:, None, :]) @ transposed + curvature(slope)
