"""Effective-compute multiplier: how many times the FLOPs the dense model needs to reach a method's loss.

The dense frontier is the loss at the compute optimum of each budget, joined by straight lines in log C, log L. Beyond
its ends it is continued with the least-squares slope of all its points, and the result marked as extrapolated.
"""

from dataclasses import dataclass

import numpy as np

from peerscale.laws.bootstrap import percentile_interval
from peerscale.laws.isoflop import IsoflopFit, VertexStatus
from peerscale.laws.results import Array


@dataclass(frozen=True, kw_only=True, slots=True)
class Multiplier:
    """One method at one budget."""

    budget: float
    multiplier: float
    """C_dense(loss) / budget; NaN where the dense loss does not fall with compute."""
    interval: tuple[float, float] | None
    """From independent draws of both methods' minima; None without bootstraps."""
    extrapolated: bool
    """The loss lies outside the dense frontier's."""


def compute_multipliers(dense: IsoflopFit, method: IsoflopFit, *, seed: int = 0) -> tuple[Multiplier, ...]:
    """Multiplier at every budget where `method` has a minimum; empty with fewer than two unflagged dense budgets.

    Args:
        dense: its unflagged minima are the frontier.
        method: any fit by budget, of the same data set and FLOP convention.
        seed: of the pairing of the two bootstraps' draws; fits made with one seed would otherwise be correlated.
    """
    frontier = [i for i, vertex in enumerate(dense.vertices) if vertex.status is VertexStatus.OK]
    if len(frontier) < 2:
        return ()
    budgets = np.array([dense.vertices[i].budget for i in frontier])
    losses = np.array([dense.vertices[i].loss for i in frontier])
    found = []
    for j, vertex in enumerate(method.vertices):
        if not vertex.is_minimum:
            continue
        interval = None
        if dense.bootstrap is not None and method.bootstrap is not None:
            dense_draws = dense.bootstrap.draws["loss"][:, frontier]
            draws = np.random.default_rng(seed).permutation(method.bootstrap.draws["loss"][:, j])
            pairs = zip(dense_draws, draws, strict=False)
            needed = np.array([compute_to_reach(budgets, frontier_draw, draw) for frontier_draw, draw in pairs])
            interval = percentile_interval(needed / vertex.budget)
        found.append(
            Multiplier(
                budget=vertex.budget,
                multiplier=compute_to_reach(budgets, losses, vertex.loss) / vertex.budget,
                interval=interval,
                extrapolated=not losses.min() <= vertex.loss <= losses.max(),
            )
        )
    return tuple(found)


def compute_to_reach(budgets: Array, losses: Array, loss: float) -> float:
    """FLOPs at which a frontier, (budgets,) ascending, reaches `loss`; NaN if it does not fall."""
    log_budgets, log_losses = np.log(budgets), np.log(losses)
    centred = log_budgets - log_budgets.mean()
    slope = centred @ log_losses / (centred @ centred)
    if not (slope < 0 and np.isfinite(loss)):
        return float("nan")
    best = np.minimum.accumulate(log_losses)  # a larger budget can always reach what a smaller one did
    target = np.log(loss)
    if target > best[0]:
        return float(np.exp(log_budgets[0] + (target - best[0]) / slope))
    if target < best[-1]:
        return float(np.exp(log_budgets[-1] + (target - best[-1]) / slope))
    return float(np.exp(np.interp(-target, -best, log_budgets)))
