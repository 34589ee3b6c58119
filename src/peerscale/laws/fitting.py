"""Common parts of all laws: the best fit with its status, intervals, the largest budget held out, JSON."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, ClassVar, Self, TypedDict, TypeVar

import numpy as np
import pandas as pd

from peerscale.laws.bootstrap import Bootstrap, percentile_interval, resample_counts, resample_residuals
from peerscale.laws.least_squares import FitStatus, Problem
from peerscale.laws.linear_fit import Array
from peerscale.laws.table import cluster_labels, name_rows, positive_columns, table_warnings

Number = float | np.ndarray
"""A coefficient or prediction, or an array of bootstrap draws of it."""

HELD_OUT = 0.1
"""Smallest share of the runs that is held out."""
TIE = 0.01
"""Relative difference within which two runs have the same budget."""
OUTLIER = 6.0
"""Distance from the law, in robust standard deviations, beyond which a warning names a run."""
SMALLEST_SCATTER = 1e-4
"""Standard deviation of residuals below which distances from the law are considered rounding."""


def to_plain(value: Any) -> Any:
    """Convert to dicts, lists, strings and finite numbers (None if not finite), ready for JSON."""
    match value:
        case StrEnum():
            return str(value)
        case float() | np.floating():
            return float(value) if math.isfinite(value) else None
        case np.integer() | np.bool_():
            return value.item()
        case Mapping():
            return {str(key): to_plain(item) for key, item in value.items()}
        case list() | tuple() | np.ndarray():
            return [to_plain(item) for item in value]
    if hasattr(value, "to_dict"):
        return to_plain(value.to_dict())
    return fields_to_plain(value) if dataclasses.is_dataclass(value) else value


def fields_to_plain(result: Any) -> dict[str, Any]:
    """The fields of a dataclass by name, converted with `to_plain`."""
    return {item.name: to_plain(getattr(result, item.name)) for item in fields(result)}


@dataclass(frozen=True, kw_only=True, slots=True)
class HoldOut:
    """The largest budget, as observed and as predicted by a fit of the smaller budgets."""

    quantity: str
    """`loss`, averaged over the held-out runs, or `x`, the optimum at their budget."""
    budget: float
    """The smallest held-out budget."""
    n: int
    """Number of held-out runs, or of held-out budgets for `x`."""
    observed: float
    predicted: float
    interval: tuple[float, float] | None
    """Bootstrap interval of the prediction, over the fitted runs; for `loss` with the scatter of as many runs as are
    held out about the law."""
    observed_interval: tuple[float, float] | None = None
    """Bootstrap interval of the observed value, for `x`."""
    rmse: float
    """Root mean squared error over the held-out runs."""
    mape: float
    """Mean absolute error in percent of the observed values."""
    missed: bool
    """Whether the intervals of prediction and observation do not overlap: the law does not extrapolate that far."""

    @classmethod
    def of(cls, observed: Array, predicted: Array, **described: Any) -> Self:
        """Make a `HoldOut` from the observed and predicted values, (n,) each, and the other fields."""
        mean, interval = float(observed.mean()), described["interval"]
        low, high = described.get("observed_interval") or (mean, mean)
        return cls(
            observed=mean, predicted=float(predicted.mean()), rmse=float(np.sqrt(np.mean((predicted - observed) ** 2))),
            mape=float(100 * np.mean(np.abs(predicted / observed - 1))),
            missed=bool(interval and (interval[1] < low or interval[0] > high)), **described,
        )  # fmt: skip

    @property
    def warnings(self) -> tuple[str, ...]:
        """A warning if the smaller budgets do not predict the held-out one."""
        off = 100 * (self.predicted / self.observed - 1)
        line = f"the smaller budgets do not predict {self.quantity} at {self.budget:.4g}: it is {off:+.2g} % off"
        return (line,) if self.missed else ()


def largest(scale: Array, start: float | None = None) -> Array:
    """Which runs to hold out, (runs,): those from `start` on, or else the largest tenth of `scale`, including ties."""
    if start is None:
        start = np.sort(scale)[-max(int(np.ceil(HELD_OUT * len(scale))), 1)] * (1 - TIE)
    return scale >= start


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Common part of the results; each law adds its coefficients."""

    law: ClassVar[str]
    """Name of the law on the command line and in JSON."""
    form: ClassVar[type]
    """Dataclass of the law's coefficients, with methods that predict; the fit is a subclass of it."""
    derived: ClassVar[tuple[str, ...]] = ()
    """Properties reported in addition to the coefficients."""
    n: int
    """Number of runs."""
    status: FitStatus
    objective_name: str
    objective_value: float
    """The minimised objective, summed over the runs."""
    warnings: tuple[str, ...] = ()
    hold_out: HoldOut | None = None
    """The largest budget predicted from the smaller ones; None if too few runs are below it."""
    bootstrap: Bootstrap | None = field(default=None, repr=False)

    @property
    def ci(self) -> dict[str, tuple[float, float]]:
        """Bootstrap intervals of the coefficients and of `derived`; empty without a bootstrap."""
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
            raise ValueError("the fit has no bootstrap: ask for one, such as bootstrap=1000")
        return percentile_interval(np.asarray(prediction(self.bootstrap.law(self.form))))

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and finite numbers for JSON."""
        plain = fields_to_plain(self) | {name: to_plain(getattr(self, name)) for name in self.derived}
        draws = plain.pop("bootstrap")  # long: last
        return {"law": self.law} | plain | {"ci": to_plain(self.ci), "bootstrap": draws}


AnyFit = TypeVar("AnyFit", bound=Fit)


class Resampling(TypedDict, total=False):
    """Options of every law of the loss, besides its columns."""

    bootstrap: int
    """Number of resamples of the runs; 0, the default, for none."""
    seed: int
    """Seed of the resampling."""
    cluster: str | None
    """Column whose equal values are drawn together, such as the run of several checkpoints."""
    budget: str | None
    """Column by which the largest runs are held out; without it, the law decides (see the law)."""
    hold_out: float | None
    """Hold out the runs of at least this budget; without it, the largest tenth, or all runs of the largest budget."""


def estimate(
    kind: type[AnyFit], table: pd.DataFrame, columns: Sequence[str], problem: Problem, scale: Array,
    *, bootstrap: int = 0, seed: int = 0, cluster: str | None = None, budget: str | None = None,
    hold_out: float | None = None,
) -> AnyFit:  # fmt: skip
    """The best fit of a law with its status, intervals, held-out error and warnings.

    Args:
        kind: class of the result.
        table, columns: the rows and their columns, for warnings.
        problem: law, losses, penalty and starting points.
        scale: (runs,); the largest runs by this value are held out if there is no column `budget`.
        bootstrap, seed, cluster, budget, hold_out: see `Resampling`.
    """
    clusters = cluster_labels(table, cluster)
    if budget is not None:
        (scale,) = positive_columns(table, budget, law=kind.law, at_least=0)
    best = problem.best()
    drawn = None
    if bootstrap:
        refits = problem.refit(best.point, resample_counts(len(table), bootstrap, seed, clusters))
        good = [one for one in refits if not one.failed]
        drawn = Bootstrap(
            draws=problem.coefficients(np.array([one.point for one in good]).reshape(len(good), len(problem.names))),
            resamples=bootstrap, failed=bootstrap - len(good), at_bound=sum(one.at_bound for one in good), seed=seed,
        )  # fmt: skip
    held = largest(scale, hold_out)
    held_out = _predict_held_out(problem, best.point, held, scale, bootstrap, seed, clusters)
    said = held_out.warnings if held_out else (f"no held-out error: {held.sum()} of {len(table)} runs held out",)
    return kind(
        **{name: float(coefficient) for name, coefficient in problem.coefficients(best.point).items()},
        n=len(table), status=problem.status(best), objective_name=str(problem.objective), objective_value=best.value,
        warnings=(*table_warnings(table, *columns), *_outliers(problem, best.point, table.index), *said),
        hold_out=held_out, bootstrap=drawn,
    )  # fmt: skip


def _predict_held_out(
    problem: Problem, start: Array, held: Array, scale: Array, bootstrap: int, seed: int, clusters: Array
) -> HoldOut | None:
    """The runs `held` (runs,) predicted from the others; None if the others are not more than the coefficients."""
    kept = np.flatnonzero(~held)
    freedom = len(kept) - len(problem.names)
    if not held.any() or freedom <= 0:
        return None
    predicted, interval = problem.predict(problem.minimise(start, kept).point), None
    if bootstrap:
        counts = np.zeros((bootstrap, len(held)), int)
        counts[:, kept] = resample_counts(len(kept), bootstrap, seed, clusters[kept])
        misses = np.where(held, np.nan, np.log(problem.loss / predicted)) * math.sqrt(len(kept) / freedom)
        misses -= np.nanmean(misses)  # those of a Huber loss are not centred
        scatter = np.exp(resample_residuals(misses, bootstrap, seed + 1, clusters))  # not with the same random numbers
        drawn = [
            np.mean((problem.predict(one.point) * off)[held])
            for one, off in zip(problem.refit(start, counts), scatter, strict=True)
            if not one.failed
        ]
        interval = percentile_interval(np.array(drawn))
    about = {"quantity": "loss", "budget": float(scale[held].min()), "n": int(held.sum()), "interval": interval}
    return HoldOut.of(problem.loss[held], predicted[held], **about)


def _outliers(problem: Problem, point: Array, rows: pd.Index) -> tuple[str, ...]:
    """A warning that names runs far from the law and gives the coefficients without them; they stay in the fit."""
    residuals = problem.residuals(point)
    distance = np.abs(residuals - np.median(residuals))
    far = distance > OUTLIER * max(1.4826 * float(np.median(distance)), SMALLEST_SCATTER)
    if not far.any():
        return ()
    refitted = problem.minimise(point, np.flatnonzero(~far)).point
    without = ", ".join(f"{name} {value:.4g}" for name, value in problem.coefficients(refitted).items())
    return (f"{far.sum()} runs far from the law, kept: {name_rows(rows[far])}; without them {without}",)
