"""What every fit says about itself, and the estimation that laws of the loss share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypedDict, TypeVar

import numpy as np
import pandas as pd

from peerscale.laws.bootstrap import Bootstrap, percentile_interval, resample_counts
from peerscale.laws.holdout import HoldOut, largest, predict_held_out
from peerscale.laws.objective import Problem
from peerscale.laws.results import FitStatus, Number, fields_to_plain, to_plain
from peerscale.laws.solver import minimise, solve
from peerscale.laws.table import name_rows, positive_columns, row_labels, table_warnings

OUTLIER = 6.0
"""Robust standard deviations from the law beyond which a run is named."""
SMALLEST_SCATTER = 1e-4
"""Standard deviation of residuals below which a run's distance from the law is rounding."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Common part of the results; each law adds its coefficients."""

    law: ClassVar[str]
    """Its name on the command line and in JSON."""
    form: ClassVar[type]
    """Dataclass of the law's coefficients, whose methods predict; the fit is one too."""
    derived: ClassVar[tuple[str, ...]] = ()
    """Properties reported beside the coefficients."""
    n: int
    """Runs."""
    status: FitStatus
    objective_name: str
    objective_value: float
    """Summed over the runs."""
    warnings: tuple[str, ...] = ()
    hold_out: HoldOut | None = None
    """The largest budget predicted from the smaller ones; None with too few runs below it."""
    bootstrap: Bootstrap | None = field(default=None, repr=False)

    @property
    def ci(self) -> dict[str, tuple[float, float]]:
        """Bootstrap intervals of the coefficients and what derives from them; empty without a bootstrap."""
        if self.bootstrap is None:
            return {}
        names = [name for name in self.derived if hasattr(self.form, name)]
        return self.bootstrap.intervals() | {n: self.interval(lambda law, n=n: getattr(law, n)) for n in names}

    def interval(self, prediction: Callable[[Any], Number]) -> tuple[float, float]:
        """Bootstrap interval of a prediction: `fit.interval(lambda law: law.optimum(1e21).loss)`.

        Raises:
            ValueError: the fit has no bootstrap.
        """
        if self.bootstrap is None:
            raise ValueError("the fit has no bootstrap: ask for one, such as bootstrap=4000")
        return percentile_interval(np.asarray(prediction(self.bootstrap.law(self.form))))

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and finite numbers for JSON."""
        plain = fields_to_plain(self) | {name: to_plain(getattr(self, name)) for name in self.derived}
        draws = plain.pop("bootstrap")  # long: last
        return {"law": self.law} | plain | {"ci": to_plain(self.ci), "bootstrap": draws}


AnyFit = TypeVar("AnyFit", bound=Fit)


class Resampling(TypedDict, total=False):
    """What every law of the loss takes besides its columns."""

    bootstrap: int
    """Number of resamples of the runs; 0, the default, for none."""
    seed: int
    """Of the resampling."""
    cluster: str | None
    """Column whose equal values are drawn together, such as the run of several checkpoints."""
    budget: str | None
    """Column by which the largest runs are held out; else what `estimate` is given."""
    hold_out: float | None
    """Hold out the runs of this budget or more; else the largest tenth, or all of the largest budget."""


def estimate(
    kind: type[AnyFit],
    table: pd.DataFrame,
    columns: Sequence[str],
    problem: Problem,
    scale: np.ndarray,
    *,
    bootstrap: int = 0,
    seed: int = 0,
    cluster: str | None = None,
    budget: str | None = None,
    hold_out: float | None = None,
    **described: Any,
) -> AnyFit:
    """The best fit of a law with its status, intervals, held-out error and warnings.

    Args:
        kind: class of the result.
        table, columns: what the rows are, for warnings.
        problem: law, losses, penalty and starts.
        scale: (runs,), by which the largest runs are held out without a column `budget`.
        bootstrap, seed, cluster, budget, hold_out: see `Resampling`.
        described: further fields of the result.
    """
    clusters = row_labels(table, cluster) if cluster else None
    if budget is not None:
        (scale,) = positive_columns(table, budget, law=kind.law, at_least=0)
    point, value, status = solve(problem)
    draws = None
    if bootstrap:
        weights = resample_counts(len(table), bootstrap, seed, clusters)
        draws = Bootstrap.of(problem, minimise(problem, point, weights), seed)
    held = largest(scale, hold_out)
    held_out = predict_held_out(problem, point, held, scale, bootstrap=bootstrap, seed=seed, clusters=clusters)
    return kind(
        **{name: float(coefficient) for name, coefficient in problem.coordinates.coefficients(point).items()},
        n=len(table),
        status=status,
        objective_name=str(problem.objective),
        objective_value=value,
        warnings=(
            *table_warnings(table, *columns),
            *_outliers(problem, point, table.index),
            *(held_out.warnings() if held_out else (f"no held-out error: {held.sum()} of {len(table)} runs held out",)),
        ),
        hold_out=held_out,
        bootstrap=draws,
        **described,
    )


def _outliers(problem: Problem, point: np.ndarray, rows: pd.Index) -> tuple[str, ...]:
    """A warning that names the runs far from the law, and the coefficients without them; they stay in the fit."""
    residuals = problem.residuals(problem.law.predict(point[None]))[0]
    distance = np.abs(residuals - np.median(residuals))
    far = distance > OUTLIER * max(1.4826 * float(np.median(distance)), SMALLEST_SCATTER)
    if not far.any():
        return ()
    refitted = minimise(problem, point, (~far)[None].astype(float)).points[0]
    without = ", ".join(f"{name} {value:.4g}" for name, value in problem.coordinates.coefficients(refitted).items())
    return (f"{far.sum()} runs far from the law, kept: {name_rows(rows[far])}; without them {without}",)
