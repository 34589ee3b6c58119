"""Approach 1 (Hoffmann et al. 2022, section 3.1): the lowest training curve at each compute, and the size of its model.

The run with the lowest loss after C FLOPs gives the optimal size x*(C); x* = coefficient * C^exponent is fitted by
least squares in log10. If the smallest or largest available size wins, the optimum is outside the range of sizes, and
the power law does not use that point.

While the learning rate is still high, the loss in mid-run is too high; the longer the run, the larger this effect. The
paper trains every size with several lengths; without that, compare with approaches 2 and 3.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd

from peerscale.errors import UserError
from peerscale.laws.fitting import Bootstrap, Fit, miss, positive_columns, resample_counts, row_labels, table_warnings
from peerscale.laws.isoflop import MIN_BUDGETS, PowerLaw, fit_power_law, predict_largest
from peerscale.laws.solver import Array, FitStatus

PER_DECADE = 20
"""Points of the envelope per decade of compute; each curve is averaged within them, which smooths it."""


@dataclass(frozen=True, kw_only=True)
class EnvelopeFit(PowerLaw, Fit):
    """The envelope and the power law through its sizes."""

    law: ClassVar[str] = "envelope"
    form: ClassVar[type] = PowerLaw
    budgets: Array
    optima: Array
    losses: Array
    """The envelope: C, the winning size, and its loss, each (points,)."""
    interior: Array
    """(points,), bool: whether smaller and larger sizes lose there; only these points enter the power law."""


def fit_envelope(
    table: pd.DataFrame, *, run: str, flops: str, x: str, loss: str, bootstrap: int = 0, seed: int = 0
) -> EnvelopeFit:
    """Fit a power law to the sizes on the envelope of training curves.

    Args:
        table: one row per logged step of every run.
        run, flops, x, loss: columns of the run's name, the FLOPs spent so far, its size (parameters or FLOPs per token,
            one value per run), and the loss.
        bootstrap: number of resamples, 0 for none; whole runs are drawn.
        seed: seed of the resampling.

    Raises:
        UserError: a column is missing or has values that are not finite numbers above zero; a run has several sizes.
    """
    compute, step_sizes, losses = positive_columns(table, flops, x, loss, law=EnvelopeFit.law, at_least=2)
    labels = row_labels(table, run)
    several = table.groupby(run, dropna=False)[x].nunique().loc[lambda counts: counts > 1]
    if len(several):
        raise UserError(f"run {several.index[0]} has {several.iloc[0]} values of {x!r}: a run has one size")
    sizes = step_sizes[np.unique(labels, return_index=True)[1]]
    budgets, curves = smooth_curves(labels, compute, losses)
    optima, lowest, interior = winning_sizes(curves, sizes)
    law, status, hold_out, draws = PowerLaw(exponent=None, coefficient=None), FitStatus.TOO_FEW_POINTS, None, None
    found, warnings = len(np.unique(optima[interior])), ()
    if found < MIN_BUDGETS:
        few = f"{found} sizes win with smaller and larger ones beside them, a power law wants {MIN_BUDGETS}"
        warnings = (f"no exponent: {few}",)
    else:
        exponent, coefficient = map(float, fit_power_law(budgets[interior], optima[interior]))
        law, status = PowerLaw(exponent=exponent, coefficient=coefficient), FitStatus.CONVERGED
        refits = []
        for counts in resample_counts(len(sizes), bootstrap, seed):
            drawn, _, inside = winning_sizes(curves[counts > 0], sizes[counts > 0])
            if len(np.unique(drawn[inside])) > 1:
                refits.append((budgets[inside], drawn[inside]))
        hold_out = predict_largest(budgets[interior], optima[interior], refits)
        if refits:
            exponents, coefficients = np.array([fit_power_law(*one) for one in refits]).T
            drawn = {"exponent": exponents, "coefficient": coefficients}
            draws = Bootstrap(draws=drawn, resamples=bootstrap, failed=bootstrap - len(refits), seed=seed)
            if np.std(exponents) > abs(exponent):
                status = FitStatus.NOT_IDENTIFIABLE
    return EnvelopeFit(
        n=len(sizes), status=status, objective_name="mse-log10",
        objective_value=float(np.nansum(np.log10(optima / law.optimum(budgets))[interior] ** 2)),
        exponent=law.exponent, coefficient=law.coefficient,
        budgets=budgets, optima=optima, losses=lowest, interior=interior,
        warnings=(*warnings, *table_warnings(table, run, flops, x, loss), *miss(hold_out)),
        hold_out=hold_out, bootstrap=draws,
    )  # fmt: skip


def smooth_curves(labels: Array, compute: Array, losses: Array) -> tuple[Array, Array]:
    """Every run's loss on a common grid of compute: averages around the grid points, joined by lines in log C.

    Returns:
        C (points,) and losses (runs, points), NaN before a run's first point and after its last.
    """
    log_compute = np.log10(compute)
    point = np.floor(log_compute * PER_DECADE).astype(int)
    grid = (np.arange(point.min(), point.max() + 1) + 0.5) / PER_DECADE
    steps = pd.DataFrame({"run": labels, "point": point, "c": log_compute, "loss": losses})
    curves = []
    for _, means in steps.groupby(["run", "point"]).mean().groupby("run"):
        c, loss = np.asarray(means, np.float64).T
        curves.append(np.interp(grid, c, loss, left=np.nan, right=np.nan))
    return 10.0**grid, np.array(curves)


def winning_sizes(curves: Array, sizes: Array) -> tuple[Array, Array, Array]:
    """The envelope of curves (runs, points): the winning size, its loss, whether smaller and larger sizes compete."""
    there = np.isfinite(curves)
    known = np.where(there, curves, np.inf)
    best = np.argmin(known, axis=0)
    smallest = np.where(there, sizes[:, None], np.inf).min(axis=0)
    largest = np.where(there, sizes[:, None], 0).max(axis=0)
    return sizes[best], known.min(axis=0), (smallest < sizes[best]) & (sizes[best] < largest)
