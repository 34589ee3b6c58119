"""The minimum of a parabola through the losses of several sizes, and whether it can be trusted."""

from enum import StrEnum

import numpy as np

from peerscale.stats.linear_fit import Array

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


def optimum_status(at: float, z: Array, curvature: float, at_least: int) -> OptimumStatus:
    """Status of the minimum at log size `at` of a curve fitted to the log sizes z, of which it needs `at_least`."""
    if len(np.unique(z)) < at_least:
        return OptimumStatus.TOO_FEW
    if not curvature > FLAT:
        return OptimumStatus.CURVATURE
    place = (at - z.min()) / np.ptp(z)
    if not 0 <= place <= 1:
        return OptimumStatus.OUTSIDE_RANGE
    return OptimumStatus.OK if OUTER <= place <= 1 - OUTER else OptimumStatus.OFF_CENTRE
