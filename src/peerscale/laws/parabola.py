"""The minimum of a parabola through the losses of several sizes, and whether it can be trusted."""

import math
from enum import StrEnum

import numpy as np

from peerscale.laws.linear_fit import Array

OUTER = 0.2
"""An optimum in the outermost fifth of the sampled log range is flagged."""
FLAT = 1e-10
"""Curvature, in units of loss per squared decade, up to which losses are flat but for rounding."""


class OptimumStatus(StrEnum):
    """Whether an optimum can be trusted; every status except `ok` is a flag."""

    OK = "ok"
    TOO_FEW = "too_few"
    """Fewer sizes than needed."""
    CURVATURE = "curvature"
    """The fit is flat or opens downwards: there is no minimum."""
    OUTSIDE_RANGE = "outside_range"
    """Outside the sampled sizes: an extrapolation."""
    OFF_CENTRE = "off_centre"
    """In the outermost fifth of the sampled range."""

    @property
    def has_number(self) -> bool:
        """Whether a study reports the number."""
        return self in (OptimumStatus.OK, OptimumStatus.OFF_CENTRE)


def parabola_optima(coefficients: Array, centre: float = 0.0) -> tuple[Array, Array]:
    """x and loss at the minima of parabolas with `coefficients` (3, ...) in log10 x - centre.

    NaN if a parabola is flat or opens downwards, or so slightly upwards that its minimum is no possible size or loss.
    """
    c0, c1, c2 = coefficients
    with np.errstate(all="ignore"):
        x, loss = 10.0 ** (centre - c1 / (2 * c2)), c0 - c1**2 / (4 * c2)
    there = (c2 > FLAT) & (x > 0) & np.isfinite(x) & (loss > 0)
    return np.where(there, x, np.nan), np.where(there, loss, np.nan)


def minimum(curve: Array, z: Array, at_least: int) -> tuple[float, OptimumStatus]:
    """Where the parabola `curve` (3,) in z is lowest, and its status; NaN if it is flat or opens downwards.

    Args:
        curve: coefficients, constant first.
        z: log sizes to which it was fitted.
        at_least: how many different sizes it needs.
    """
    _, b, c = curve.tolist()
    at = -b / (2 * c) if c > FLAT else math.nan
    if len(np.unique(z)) < at_least:
        return at, OptimumStatus.TOO_FEW
    if math.isnan(at):
        return at, OptimumStatus.CURVATURE
    place = (at - z.min()) / np.ptp(z)
    if not 0 <= place <= 1:
        return at, OptimumStatus.OUTSIDE_RANGE
    return at, OptimumStatus.OK if OUTER <= place <= 1 - OUTER else OptimumStatus.OFF_CENTRE


def recentred(curve: Array, centre: float) -> tuple[float, float, float]:
    """The coefficients in log10 x of the parabola `curve` (3,) in log10 x - centre."""
    a, b, c = curve.tolist()
    return a - b * centre + c * centre**2, b - 2 * c * centre, c
