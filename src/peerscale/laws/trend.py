"""A straight line through a few estimates whose errors are known, and its value beyond them.

With three points the scatter about a line has one degree of freedom and tells little. So the error of the value comes
from those of the points, with the degrees of freedom of Satterthwaite (1946). Only where the points scatter by more
than their errors is it widened, by the factor of Birge (1932); it is never narrowed.
"""

import math
from dataclasses import dataclass

import numpy as np

from peerscale.laws.fitting import StudentValue
from peerscale.laws.solver import Array

MIN_POINTS = 3
"""One more than a line has coefficients."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Extrapolation(StudentValue):
    """The value of the line at one place, in the units of the points."""

    misfit: float
    """Root mean square of the points' distances from the line, each over its standard error; 1 is expected."""


def extrapolate(x: Array, y: Array, se: Array, df: Array, at: float) -> Extrapolation:
    """Weighted least squares through points (points,), three or more, of which each weighs 1 / se^2.

    Args:
        x, y: the points; their errors are independent.
        se, df: standard error of each y, and its degrees of freedom.
        at: the x whose y is asked for.
    """
    if len(x) < MIN_POINTS:
        raise ValueError(f"{len(x)} points, fewer than {MIN_POINTS}")
    weights = 1 / se**2
    centre = weights @ x / weights.sum()
    spread = weights @ (x - centre) ** 2
    level, slope = weights @ y / weights.sum(), weights @ ((x - centre) * y) / spread
    misfit = math.sqrt((((y - level - slope * (x - centre)) / se) ** 2).sum() / (len(x) - 2))
    of_points = weights * (1 / weights.sum() + (at - centre) * (x - centre) / spread)  # what each y adds to the value
    variances = (of_points * se) ** 2
    return Extrapolation(
        value=float(level + slope * (at - centre)), se=math.sqrt(variances.sum()) * max(1.0, misfit),
        df=float(variances.sum() ** 2 / np.sum(variances**2 / df)), misfit=misfit,
    )  # fmt: skip
