"""Least-squares parabolas in log10 x, many sets of losses at once, and where they are lowest."""

import numpy as np

from peerscale.laws.results import Array


def fit_parabolas(x: Array, losses: Array) -> tuple[float, Array, Array, Array]:
    """Losses (..., runs) by c0 + c1 (z - centre) + c2 (z - centre)^2, z = log10 x (runs,), of three or more sizes.

    Returns:
        centre, c0, c1, c2; the last three (...).
    """
    z = np.log10(x)
    centre = float(z.mean())  # z^2 of uncentred sizes is almost collinear with z
    c0, c1, c2 = np.linalg.pinv(np.vander(z - centre, 3, increasing=True)) @ losses.T
    return centre, c0, c1, c2


def minima(centre: float, c0: Array, c1: Array, c2: Array) -> tuple[Array, Array]:
    """x and loss where parabolas as of `fit_parabolas` are lowest; NaN where they open downwards."""
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        x, loss = 10.0 ** (centre - c1 / (2 * c2)), c0 - c1**2 / (4 * c2)
    there = (c2 > 0) & np.isfinite(x) & (x > 0)
    return np.where(there, x, np.nan), np.where(there, loss, np.nan)
