"""Laws that are sums of power laws: what approach 3, the granular and the PEER law have in common.

L = sum_k s_k prod_v v^(-exponent), with positive sizes s_k. With the logarithms of the sizes and the exponents as
coordinates theta, every power is exp(M_k . theta), and gradient and Hessian are exact and cheap. Centred logarithms of
the variables in M are the normalised units: no coordinate is large and none needs bounds in raw units.
"""

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from peerscale.laws.objective import Coordinates, Curvature, Objective, Problem
from peerscale.laws.results import Array

Powers = Mapping[str, Mapping[str, Array]]
"""Size's name -> exponent's name -> logarithm of the variable (runs,): {"A": {"alpha": log_n}, "E": {}} is
A / N^alpha + E. An exponent may occur in several powers."""
EXPONENT_RANGE = (0.01, 3.0)
SIZE_RANGE = (-12.0, 5.0)
"""Range of log(size of a power at the centre of the data / median loss)."""


@dataclass(frozen=True, slots=True)
class PowerSum:
    """A sum of powers as an `objective.Predictor`."""

    terms: Array
    """M, (powers, runs, coordinates)."""

    def powers(self, points: Array) -> Array:
        return np.exp(points @ self.terms.transpose(0, 2, 1))

    def predict(self, points: Array) -> Array:
        return self.powers(points).sum(axis=0)

    def derivatives(self, points: Array) -> tuple[Array, Array, Curvature]:
        powers = self.powers(points)
        jacobian = np.zeros((*points.shape, powers.shape[-1]))
        for power, term in zip(powers, self.terms, strict=True):
            jacobian += power[:, None, :] * term.T

        def curvature(factor: Array) -> Array:
            squares = (self.terms[:, :, :, None] * self.terms[:, :, None, :]).reshape(*self.terms.shape[:2], -1)
            return np.sum((powers * factor) @ squares, axis=0).reshape(*points.shape, points.shape[1])

        return powers.sum(axis=0), jacobian, curvature


def power_problem(
    powers: Powers,
    loss: Array,
    *,
    objective: Objective | str,
    delta: float,
    start_exponents: Sequence[float],
    signed: Collection[str] = (),
) -> Problem:
    """The fit of a sum of powers; coordinates are the logarithms of the sizes, then the exponents.

    Starts are every combination of `start_exponents`, with the sizes by non-negative least squares on the loss: for
    given exponents the law is linear in them (variable projection), so that no start depends on a unit. The exponents
    named in `signed` may be negative.
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
    lower[[name in signed for name in names]] = -EXPONENT_RANGE[1]
    coordinates = Coordinates(names=tuple(names), is_log=is_log, to_raw=to_raw, lower=lower, upper=upper)
    return Problem(
        law=PowerSum(terms), loss=loss, coordinates=coordinates, starts=np.array(starts),
        objective=Objective(objective), delta=delta,
    )  # fmt: skip
