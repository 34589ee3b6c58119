"""Held-out runs: how well a law fitted to the smaller budgets predicts the largest."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from peerscale.laws.bootstrap import percentile_interval, resample_counts
from peerscale.laws.objective import Problem
from peerscale.laws.results import Array, fields_to_plain
from peerscale.laws.solver import minimise

SHARE = 0.1
"""Of the runs, held out at least."""
TIE = 0.01
"""Relative difference within which two runs have one budget."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HoldOut:
    """What the fit of the other runs makes of the held-out ones."""

    quantity: str
    """`loss`, averaged over the held-out runs, or `x`, the optimum at their budget."""
    budget: float
    """The smallest that was held out."""
    n: int
    """Runs held out, or budgets for `x`."""
    observed: float
    predicted: float
    interval: tuple[float, float] | None
    """Bootstrap interval of the prediction, over the runs that were fitted."""
    observed_interval: tuple[float, float] | None = None
    """Bootstrap interval of what was observed, for `x`."""
    rmse: float
    """Root mean squared error over the held-out runs."""
    mape: float
    """Mean absolute error in percent of what was observed."""

    @property
    def missed(self) -> bool:
        """Whether the intervals of prediction and observation are apart: the law does not extrapolate so far."""
        if self.interval is None:
            return False
        low, high = self.observed_interval or (self.observed, self.observed)
        return bool(self.interval[1] < low or self.interval[0] > high)

    def warnings(self) -> tuple[str, ...]:
        """One that names the miss, if it is one."""
        if not self.missed:
            return ()
        off = 100 * (self.predicted / self.observed - 1)
        return (f"the smaller budgets do not predict {self.quantity} at {self.budget:.4g}: it is {off:+.2g} % off",)

    def to_dict(self) -> dict[str, Any]:
        return fields_to_plain(self) | {"missed": self.missed}


def largest(scale: Array, start: float | None = None) -> Array:
    """Which runs to hold out, (runs,): those from `start` on, or else the largest tenth of `scale` with its ties."""
    if start is None:
        start = np.sort(scale)[-max(int(np.ceil(SHARE * len(scale))), 1)] * (1 - TIE)
    return scale >= start


def predict_held_out(
    problem: Problem, start: Array, held: Array, scale: Array,
    *, bootstrap: int = 0, seed: int = 0, clusters: Array | None = None,
) -> HoldOut | None:  # fmt: skip
    """The runs `held` (runs,) predicted from the others; None if those are no more than the law has coefficients.

    Args:
        problem: the fit of all runs.
        start: (p,), such as its solution.
        held, scale: which runs, and the budgets (runs,).
        bootstrap, seed, clusters: of the interval.
    """
    kept = np.flatnonzero(~held)
    if not held.any() or len(kept) <= len(problem.coordinates.names):
        return None

    best = minimise(problem, start, (~held)[None].astype(float)).points
    predicted, losses, interval = problem.law.predict(best)[0, held], problem.loss[held], None
    if bootstrap:
        weights = np.zeros((bootstrap, len(held)))
        weights[:, kept] = resample_counts(len(kept), bootstrap, seed, None if clusters is None else clusters[kept])
        refits = minimise(problem, start, weights)
        interval = percentile_interval(problem.law.predict(refits.points[~refits.failed])[:, held].mean(axis=1))
    return HoldOut(
        quantity="loss",
        budget=float(scale[held].min()),
        n=int(held.sum()),
        observed=float(losses.mean()),
        predicted=float(predicted.mean()),
        interval=interval,
        rmse=float(np.sqrt(np.mean((predicted - losses) ** 2))),
        mape=float(100 * np.mean(np.abs(predicted / losses - 1))),
    )
