"""The compute multiplier: dense's compute divided by the compute that a method needs for the same loss.

A frontier is the losses at the compute optima of all budgets, joined by straight lines in log C and log L. Nothing is
extrapolated: at each budget the two methods are compared at the higher of their two losses, which both frontiers reach
at or below that budget. At the smallest common budget it is the lower loss, which both reach at or above that budget.
"""

import numpy as np

from peerscale.laws.linear_fit import Array


def compute_multipliers(dense: tuple[Array, Array], method: tuple[Array, Array], trend: Array | None = None) -> Array:
    """The multiplier at every budget, (..., budgets).

    Args:
        dense, method: compute (budgets,), ascending, and loss (..., budgets), for the same budgets. The two may count
            the compute of a budget differently.
        trend: which budgets (budgets,) belong to a trend. They are compared as if there were no other budgets, so that
            a trend depends on nothing outside it.

    Returns:
        Above 1 if dense needs more compute; NaN if a loss is unknown or would be extrapolated.
    """
    losses = np.stack([dense[1], method[1]])
    level, known = losses.max(axis=0), np.isfinite(losses).all(axis=0)
    smallest = known & (known.cumsum(axis=-1) == 1)
    level = np.where(smallest, losses.min(axis=0), level)
    found = compute_to_reach(*dense, level) / compute_to_reach(*method, level)
    if trend is not None and trend.any() and not trend.all():
        own, other = ((compute[trend], losses[..., trend]) for compute, losses in (dense, method))
        found[..., trend] = compute_multipliers(own, other)
    return found


def compute_to_reach(compute: Array, losses: Array, levels: Array) -> Array:
    """The least compute at which a frontier (..., budgets) reaches losses (..., levels), by interpolation.

    Budgets without a loss are ignored. NaN if a level is outside the frontier.
    """
    x = np.fmax.accumulate(np.where(np.isfinite(losses), np.log(compute), np.nan), axis=-1)
    y = np.fmin.accumulate(np.log(losses), axis=-1)  # more compute can always reach what less compute reached
    target = np.log(levels)
    reached = y[..., None, :] <= target[..., None]
    after = reached.argmax(axis=-1)
    (x0, y0), (x1, y1) = (
        (np.take_along_axis(x, at, axis=-1), np.take_along_axis(y, at, axis=-1))
        for at in (np.maximum(after - 1, 0), after)
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        between = x0 + (x1 - x0) * (y0 - target) / (y0 - y1)
    return np.exp(np.where(reached.any(axis=-1), np.where(y1 == target, x1, between), np.nan))
