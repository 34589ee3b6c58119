"""What a fit minimises: a penalty on residuals summed over runs, as many fits at once."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from peerscale.laws.results import Array


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
class Problem:
    """Fits of one law to one set of runs that differ in their points (R, p) only, or in the runs' weights too."""

    residuals: Callable[[Array, Array], tuple[Array, Array]]
    """Points (R, p) and the members' numbers (R,) -> residuals (R, runs) and their Jacobian (R, p, runs)."""
    curvature: Callable[[Array, Array], Array] | None = None
    """Points and slopes of the penalty (R, runs) -> sum over runs of slope * second derivative of the residual,
    (R, p, p). None leaves it out (Gauss-Newton)."""
    objective: Objective
    delta: float = np.inf
    weights: Array | None = None
    """(all members, runs); None counts every run once."""

    def value(self, points: Array, members: Array) -> Array:
        """Objective per member, (R,)."""
        with np.errstate(over="ignore", invalid="ignore"):
            residuals, _ = self.residuals(points, members)
            size = np.abs(residuals)
            inner = np.minimum(size, self.delta)
            penalty = inner * (size - inner / 2) if self.objective.robust else residuals**2
            return np.sum(penalty if self.weights is None else penalty * self.weights[members], axis=1)

    def derivatives(self, points: Array, members: Array) -> tuple[Array, Array]:
        """Gradient (R, p) and Hessian (R, p, p)."""
        residuals, jacobian = self.residuals(points, members)
        if self.objective.robust:
            slope = np.clip(residuals, -self.delta, self.delta)
            bend = (np.abs(residuals) <= self.delta).astype(float)
        else:
            slope, bend = 2 * residuals, np.full_like(residuals, 2.0)
        if self.weights is not None:
            slope, bend = slope * self.weights[members], bend * self.weights[members]
        gradient = (jacobian @ slope[:, :, None])[:, :, 0]
        hessian = (jacobian * bend[:, None, :]) @ jacobian.transpose(0, 2, 1)
        return gradient, hessian if self.curvature is None else hessian + self.curvature(points, slope)


def sum_of_powers(terms: Array, loss: Array, objective: Objective, delta: float) -> Problem:
    """The problem of a law that is a sum of power laws, L = sum_k exp(M_k . theta).

    With the coefficients' logarithms and the exponents as coordinates theta, every power is the exponential of a
    linear form, and gradient and Hessian are exact and cheap. Centred logarithms of sizes and tokens in M are the
    normalised units: no coordinate is large and none needs bounds in raw units.

    Args:
        terms: M, (powers, runs, coordinates).
        loss: (runs,).
        objective: what to minimise.
        delta: where Huber turns linear.
    """
    squares = (terms[:, :, :, None] * terms[:, :, None, :]).reshape(*terms.shape[:2], -1)

    def shares(points: Array) -> tuple[Array, Array]:
        """Residuals, and their derivative by each M_k . theta, (powers, R, runs)."""
        powers = np.exp(points @ terms.transpose(0, 2, 1))
        total = powers.sum(axis=0)
        return (np.log(total / loss), powers / total) if objective.logarithmic else (total - loss, powers)

    def jacobian(share: Array) -> Array:
        return np.sum([share[k][:, None, :] * term.T for k, term in enumerate(terms)], axis=0)

    def residuals(points: Array, members: Array) -> tuple[Array, Array]:
        residual, share = shares(points)
        return residual, jacobian(share)

    def curvature(points: Array, slope: Array) -> Array:
        # sum_k share_k m_k m_k', less the square of sum_k share_k m_k for a log residual
        _, share = shares(points)
        n_members, p = points.shape
        hessian = sum((share[k] * slope) @ square for k, square in enumerate(squares)).reshape(n_members, p, p)
        if objective.logarithmic:
            first = jacobian(share)
            hessian -= (first * slope[:, None, :]) @ first.transpose(0, 2, 1)
        return hessian

    return Problem(residuals=residuals, curvature=curvature, objective=objective, delta=delta)
