"""Extrapolation of a straight line through a few estimates with known errors.

With three points, the scatter around a line has only one degree of freedom. The error of the value is therefore
computed from the errors of the points, with the degrees of freedom of Satterthwaite (1946). If the points scatter more
than their errors, it is widened by the factor of Birge (1932); it is never narrowed.
"""

import math
from dataclasses import dataclass

import numpy as np

from peerscale.laws.fitting import StudentValue
from peerscale.laws.solver import Array

MIN_POINTS = 3
"""One more than the coefficients of a line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Extrapolation(StudentValue):
    """The value of the line at one x, in the units of the points."""

    misfit: float
    """Root mean square distance of the points from the line, in units of their standard errors; 1 is expected."""


def extrapolate(x: Array, y: Array, se: Array, df: Array, at: float) -> Extrapolation:
    """Weighted least squares through three or more points (points,), with weights 1 / se^2.

    Args:
        x, y: the points; their errors are independent.
        se, df: standard error of each y, and its degrees of freedom.
        at: the x at which y is wanted.
    """
    weights = 1 / se**2
    centre = weights @ x / weights.sum()
    spread = weights @ (x - centre) ** 2
    level, slope = weights @ y / weights.sum(), weights @ ((x - centre) * y) / spread
    misfit = math.sqrt((((y - level - slope * (x - centre)) / se) ** 2).sum() / (len(x) - 2))
    of_points = weights * (1 / weights.sum() + (at - centre) * (x - centre) / spread)  # weight of each y in the value
    variances = (of_points * se) ** 2
    return Extrapolation(
        value=float(level + slope * (at - centre)), se=math.sqrt(variances.sum()) * max(1.0, misfit),
        df=float(variances.sum() ** 2 / np.sum(variances**2 / df)), misfit=misfit,
    )  # fmt: skip
