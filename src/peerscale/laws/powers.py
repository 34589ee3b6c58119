"""Laws that are sums of power laws: what approach 3 and the granular law have in common.

L = sum_k s_k prod_v v^(-exponent), with positive sizes s_k. With the logarithms of the sizes and the exponents as
coordinates theta, every power is exp(M_k . theta), and gradient and Hessian are exact and cheap. Centred logarithms of
the variables in M are the normalised units: no coordinate is large and none needs bounds in raw units.
"""

import itertools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from peerscale.laws.objective import Coordinates, Misfit, Objective
from peerscale.laws.results import Array

Powers = Mapping[str, Mapping[str, Array]]
"""Size's name -> exponent's name -> logarithm of the variable (runs,): {"A": {"alpha": log_n}, "E": {}} is
A / N^alpha + E. An exponent may occur in several powers."""
EXPONENT_RANGE = (0.01, 3.0)
SIZE_RANGE = (-12.0, 5.0)
"""Range of log(size of a power at the centre of the data / median loss)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PowerSum:
    """A sum of powers as an `objective.Problem`."""

    terms: Array
    """M, (powers, runs, coordinates)."""
    loss: Array
    """(runs,)."""
    logarithmic: bool
    """Whether residuals are of log losses."""

    def residuals(self, points: Array, members: Array) -> Array:
        """Residuals (R, runs) at points (R, coordinates)."""
        total = np.exp(points @ self.terms.transpose(0, 2, 1)).sum(axis=0)
        return np.log(total / self.loss) if self.logarithmic else total - self.loss

    def derivatives(self, points: Array, members: Array) -> tuple[Array, Array, Callable[[Array], Array]]:
        """Residuals, Jacobian and exact curvature."""
        powers = np.exp(points @ self.terms.transpose(0, 2, 1))
        total = powers.sum(axis=0)
        residuals = np.log(total / self.loss) if self.logarithmic else total - self.loss
        shares = powers / total if self.logarithmic else powers  # d residual / d (M_k . theta)
        jacobian = np.zeros((*points.shape, len(self.loss)))
        for share, term in zip(shares, self.terms, strict=True):
            jacobian += share[:, None, :] * term.T

        def curvature(slope: Array) -> Array:
            # sum_k share_k m_k m_k', less the square of sum_k share_k m_k for a log residual
            n_members, p = points.shape
            hessian = np.zeros((n_members, p * p))
            for share, term in zip(shares, self.terms, strict=True):
                hessian += (share * slope) @ (term[:, :, None] * term[:, None, :]).reshape(len(term), -1)
            hessian = hessian.reshape(n_members, p, p)
            if self.logarithmic:
                hessian -= (jacobian * slope[:, None, :]) @ jacobian.transpose(0, 2, 1)
            return hessian

        return residuals, jacobian, curvature


def power_problem(
    powers: Powers,
    loss: Array,
    *,
    objective: Objective,
    delta: float,
    start_exponents: tuple[float, ...],
    signed: Collection[str] = (),
) -> tuple[Misfit, Coordinates, Array]:
    """A sum of powers as `fit.estimate` takes it: misfit, coordinates and starts.

    Starts are every combination of `start_exponents`, with the sizes by non-negative least squares on the loss: for
    given exponents the law is linear in them (variable projection), so that no start depends on a unit. The exponents
    named in `signed` may be negative.
    """
    terms, coordinates = _coordinates(powers, loss, signed)
    problem = PowerSum(terms=terms, loss=loss, logarithmic=objective.logarithmic)
    starts = _starts(terms, coordinates.is_log, loss, start_exponents)
    return Misfit(problem=problem, objective=objective, delta=delta), coordinates, starts


def _coordinates(powers: Powers, loss: Array, signed: Collection[str]) -> tuple[Array, Coordinates]:
    """M, and the coordinates: the logarithms of the sizes, then the exponents."""
    exponents = list(dict.fromkeys(name for variables in powers.values() for name in variables))
    names = (*powers, *exponents)
    terms = np.zeros((len(powers), len(loss), len(names)))
    to_raw = np.eye(len(names))
    for k, variables in enumerate(powers.values()):
        terms[k, :, k] = 1.0
        for name, log_variable in variables.items():
            centre = log_variable.mean()
            terms[k, :, names.index(name)] = centre - log_variable
            to_raw[k, names.index(name)] = centre
    is_log = np.arange(len(names)) < len(powers)
    lower, upper = (
        np.where(is_log, np.log(np.median(loss)) + size, exponent)
        for size, exponent in zip(SIZE_RANGE, EXPONENT_RANGE, strict=True)
    )
    lower[[name in signed for name in names]] = -EXPONENT_RANGE[1]
    return terms, Coordinates(names=names, is_log=is_log, to_raw=to_raw, lower=lower, upper=upper)


def _starts(terms: Array, is_log: Array, loss: Array, exponents: tuple[float, ...]) -> Array:
    floor = 1e-3 * np.median(loss)
    starts = []
    for grid_point in itertools.product(exponents, repeat=int(np.sum(~is_log))):
        columns = np.exp(terms[:, :, ~is_log] @ np.array(grid_point))
        sizes, _ = nnls(columns.T, loss)
        starts.append([*np.log(np.maximum(sizes, floor)), *grid_point])
    return np.array(starts)
