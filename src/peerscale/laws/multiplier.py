"""Compute multiplier: dense's compute over the compute that a method needs for the same loss.

Both frontiers are the losses at the compute optima of their budgets, joined by straight lines in log C, log L. Nothing
is extrapolated: at each budget the level is the higher of the two losses, which both frontiers reach at or below that
budget; at the smallest budget it is the lower of the two, which both reach at or above it.
"""

import numpy as np

from peerscale.laws.results import Array


def compute_multiplier(dense: tuple[Array, Array], method: tuple[Array, Array], place: int) -> float:
    """The multiplier at the budget with index `place`.

    Args:
        dense, method: compute and loss, (budgets,) each, ascending in compute, of the same budgets. The two may count
            the compute of one budget differently.
        place: which budget.

    Returns:
        Above 1 where dense needs more compute; NaN where a loss is unknown or one of the two would be extrapolated.
    """
    losses = (dense[1][place], method[1][place])
    level = min(losses) if place == 0 else max(losses)
    return compute_to_reach(*dense, level) / compute_to_reach(*method, level)


def compute_to_reach(compute: Array, losses: Array, level: float) -> float:
    """Compute at which a frontier (budgets,) reaches a loss, by interpolation; NaN if it lies outside the frontier."""
    known = np.isfinite(losses)
    if known.sum() < 2 or not np.isfinite(level):
        return float("nan")
    lowest = np.minimum.accumulate(np.log(losses[known]))  # more compute can always reach what less did
    target = np.log(level)
    if not lowest[-1] <= target <= lowest[0]:
        return float("nan")
    return float(np.exp(np.interp(-target, -lowest, np.log(compute[known]))))


def growth(budgets: Array, multipliers: Array) -> Array:
    """Slope of ln multiplier in log10 of the budget, by least squares; multipliers (..., budgets) -> (...)."""
    centred = np.log10(budgets) - np.log10(budgets).mean()
    return np.log(multipliers) @ centred / (centred @ centred)
