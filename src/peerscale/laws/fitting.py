"""Common parts of all laws: checked columns, the best fit with its status, bootstrap intervals, held-out errors, JSON.

Intervals come from the bootstrap (Efron 1979): refits of resampled runs. They cover only the scatter of the runs around
the law. They do not cover the misfit of the law outside the data, nor the noise of a loss that was evaluated on few
tokens, unless that noise differs between runs.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any, ClassVar, Self, TypedDict, TypeVar

import numpy as np
import pandas as pd
from scipy.stats import t as student

from peerscale.errors import UserError
from peerscale.laws.solver import Array, FitStatus, Number, Problem, minimise, solve

LEVEL = 0.95
"""Confidence level of all intervals."""
STORED_DRAWS = 500
"""Number of draws written to JSON, for intervals of later predictions."""
HELD_OUT = 0.1
"""Smallest share of the runs that is held out."""
TIE = 0.01
"""Relative difference within which two runs have the same budget."""
OUTLIER = 6.0
"""Distance from the law, in robust standard deviations, beyond which a warning names a run."""
SMALLEST_SCATTER = 1e-4
"""Standard deviation of residuals below which distances from the law are considered rounding."""
SHOWN = 5
"""Number of rows named in a message."""
INCOMPARABLE = {
    "FLOPs of different conventions": ("convention", "flop_convention", "flops_convention"),
    "losses per token of different tokenizers": ("tokenizer", "tokeniser", "vocab", "vocab_size", "vocabulary"),
    "losses on different data": ("data", "dataset", "corpus", "val_set"),
}
"""What must not be mixed within one fit, and names of columns (in any case) that would show it."""


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
        return value.to_dict()
    return fields_to_plain(value) if dataclasses.is_dataclass(value) else value


def fields_to_plain(result: Any) -> dict[str, Any]:
    """The fields of a dataclass by name, converted with `to_plain`."""
    return {item.name: to_plain(getattr(result, item.name)) for item in fields(result)}


def positive_columns(table: pd.DataFrame, *names: str, law: str, at_least: int) -> list[Array]:
    """The named columns as float64, since integer products such as 6 N D overflow int64.

    Raises:
        UserError: a column is missing, a value is not a finite number above zero (the message names the rows), or there
            are fewer than `at_least` rows.
    """
    if table.empty:
        raise UserError(f"the table has no rows for the {law} law")
    values = []
    for name in names:
        require_column(table, name)
        column = pd.to_numeric(table[name], errors="coerce").to_numpy(np.float64, na_value=np.nan)
        bad = ~(np.isfinite(column) & (column > 0))
        if bad.any():
            found = ", ".join(map(str, table.loc[bad, name].iloc[:SHOWN]))
            where = name_rows(table.index[bad])
            raise UserError(f"column {name!r} must hold finite numbers above 0, not so in {where}: {found}")
        values.append(np.asarray(column))
    if len(table) < at_least:
        raise UserError(f"{len(table)} rows are too few for the {law} law: it has {at_least} coefficients")
    return values


def require_column(table: pd.DataFrame, name: str) -> None:
    """Raise `UserError` if the table has no column `name`."""
    if name not in table.columns:
        raise UserError(f"no column {name!r} in the table; there are: {', '.join(map(str, table.columns))}")


def row_labels(table: pd.DataFrame, column: str) -> Array:
    """The values of a column as integers from 0, equal values as equal integers; `UserError` without the column."""
    require_column(table, column)
    return np.asarray(pd.factorize(table[column], use_na_sentinel=False)[0])


def cluster_labels(table: pd.DataFrame, column: str) -> Array:
    """The labels of the clusters that are resampled; `UserError` if there is no such column, or only one cluster."""
    labels = row_labels(table, column)
    if labels.max(initial=0) == 0:
        raise UserError(f"column {column!r} holds one value: there must be several clusters to resample")
    return labels


def table_warnings(table: pd.DataFrame, *names: str) -> tuple[str, ...]:
    """Warnings about these rows: rows equal to an earlier one in all `names`, and mixed measures (`INCOMPARABLE`).

    Duplicates stay in the fit; the reader has to judge whether they are repeats or mistakes.
    """
    found = []
    rows = table.index[table.duplicated(list(names))]
    if len(rows):
        found.append(f"{len(rows)} duplicated rows, kept and so counted again: {name_rows(rows)}")
    for what, columns in INCOMPARABLE.items():
        for column in table.columns:
            kinds = table[column].dropna().unique() if str(column).lower().replace(" ", "_") in columns else ()
            if len(kinds) > 1:
                shown = ", ".join(map(str, kinds[:SHOWN]))
                found.append(f"column {column!r} mixes {shown}: {what} are not comparable")
    return tuple(found)


def name_rows(rows: pd.Index) -> str:
    """The first labels, and how many more there are."""
    more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    return f"{rows.name or 'row'} {', '.join(map(str, rows[:SHOWN]))}{more}"


def resample_counts(n: int, resamples: int, seed: int, clusters: Array | None = None) -> Array:
    """How often each of `n` runs occurs in each resample, (resamples, n), as weights for a fit.

    Runs with the same label in `clusters` (n,) are drawn together; None: every run is its own cluster.
    """
    labels = np.arange(n) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    n_clusters = labels.max() + 1
    draw = np.random.default_rng(seed).multinomial
    return draw(n_clusters, np.full(n_clusters, 1 / n_clusters), size=resamples)[:, labels].astype(float)


def resample_residuals(residuals: Array, resamples: int, seed: int, clusters: Array | None = None) -> Array:
    """Residuals drawn with replacement, (resamples, n), for other runs, or designs too small to lose one (five sizes).

    Every run takes the residual of a run in a drawn cluster; runs of the same cluster draw from the same cluster, so
    that a shift common to a cluster stays common. Without `clusters` this is the usual residual bootstrap. NaN
    residuals are never drawn; the result is NaN if there are no others.
    """
    rng = np.random.default_rng(seed)
    n = len(residuals)
    labels = np.arange(n) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    known = np.flatnonzero(np.isfinite(residuals))
    if not len(known):
        return np.full((resamples, n), np.nan)
    by_cluster = known[np.argsort(labels[known], kind="stable")]
    sizes = np.bincount(labels[known], minlength=labels.max() + 1)
    first = np.cumsum(sizes) - sizes
    source = rng.choice(np.flatnonzero(sizes), size=(resamples, len(sizes)))[:, labels]
    return residuals[by_cluster[first[source] + np.floor(rng.random((resamples, n)) * sizes[source]).astype(int)]]


def percentile_interval(values: Array) -> tuple[float, float]:
    """95 % percentile interval of the finite `values` (draws,); NaN if there are none."""
    finite = values[np.isfinite(values)]
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(finite, [tail, 100 - tail]) if len(finite) else (np.nan, np.nan)
    return float(low), float(high)


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentValue:
    """A number whose standard error is an estimate."""

    value: float
    se: float
    """Standard error from all known sources."""
    df: float
    """Degrees of freedom of `se`."""

    @property
    def interval(self) -> tuple[float, float]:
        """Student's 95 % interval."""
        half = float(student.ppf((1 + LEVEL) / 2, self.df)) * self.se
        return self.value - half, self.value + half

    @property
    def p(self) -> float:
        """Two-sided p-value: the probability of a value at least this far from zero if the true value is zero."""
        return float(2 * student.sf(abs(self.value) / self.se, self.df)) if self.se > 0 else math.nan


@dataclass(frozen=True, kw_only=True, slots=True)
class Bootstrap:
    """Coefficients of the resampled fits."""

    draws: Mapping[str, Array]
    """By coefficient; the first axis runs over the successful resamples."""
    resamples: int
    """Number of requested resamples."""
    failed: int
    """Number of resamples without a fit, which are left out."""
    at_bound: int = 0
    """Number of the other resamples that ended on a bound; they are kept."""
    seed: int

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Percentile interval of every coefficient."""
        return {name: percentile_interval(values) for name, values in self.draws.items() if values.ndim == 1}

    def law(self, form: type) -> Any:
        """A law of class `form` whose coefficients are arrays of draws, or their defaults if they have no draws."""
        return form(**{item.name: self.draws[item.name] for item in fields(form) if item.name in self.draws})

    def to_dict(self) -> dict[str, Any]:
        """Counts, seed, level and the first draws (of coefficients and of losses at optima) to six digits, for JSON."""
        six_digits = np.vectorize(lambda value: float(f"{value:.6g}"), otypes=[float])
        draws = {
            name: to_plain(six_digits(values[:STORED_DRAWS]))
            for name, values in self.draws.items()
            if values.ndim == 1 or name == "loss"
        }
        return asdict(self) | {"level": LEVEL, "draws": draws}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`, with only the stored draws."""
        draws = {name: np.asarray(values, float) for name, values in stored["draws"].items()}
        return cls(**{key: stored[key] for key in ("resamples", "failed", "at_bound", "seed")}, draws=draws)


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


def miss(found: HoldOut | None) -> tuple[str, ...]:
    """A warning if the smaller budgets do not predict the held-out one."""
    if found is None or not found.missed:
        return ()
    off = 100 * (found.predicted / found.observed - 1)
    return (f"the smaller budgets do not predict {found.quantity} at {found.budget:.4g}: it is {off:+.2g} % off",)


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
            raise ValueError("the fit has no bootstrap: ask for one, such as bootstrap=4000")
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
    clusters = cluster_labels(table, cluster) if cluster else None
    if budget is not None:
        (scale,) = positive_columns(table, budget, law=kind.law, at_least=0)
    point, value, status = solve(problem)
    drawn = None
    if bootstrap:
        refits = minimise(problem, point, resample_counts(len(table), bootstrap, seed, clusters))
        good = ~refits.failed
        drawn = Bootstrap(
            draws=problem.coordinates.coefficients(refits.points[good]), resamples=bootstrap,
            failed=int(np.sum(~good)), at_bound=int(np.sum(refits.at_bound[good])), seed=seed,
        )  # fmt: skip
    held = largest(scale, hold_out)
    held_out = _predict_held_out(problem, point, held, scale, bootstrap, seed, clusters)
    said = miss(held_out) if held_out else (f"no held-out error: {held.sum()} of {len(table)} runs held out",)
    return kind(
        **{name: float(coefficient) for name, coefficient in problem.coordinates.coefficients(point).items()},
        n=len(table),
        status=status, objective_name=str(problem.objective), objective_value=value,
        warnings=(*table_warnings(table, *columns), *_outliers(problem, point, table.index), *said),
        hold_out=held_out, bootstrap=drawn,
    )  # fmt: skip


def _predict_held_out(
    problem: Problem, start: Array, held: Array, scale: Array, bootstrap: int, seed: int, clusters: Array | None
) -> HoldOut | None:
    """The runs `held` (runs,) predicted from the others; None if the others are not more than the coefficients."""
    kept = np.flatnonzero(~held)
    if not held.any() or len(kept) <= len(problem.coordinates.names):
        return None
    best = minimise(problem, start, (~held)[None].astype(float)).points
    predicted, interval = problem.law.predict(best)[0, held], None
    if bootstrap:
        weights = np.zeros((bootstrap, len(held)))
        weights[:, kept] = resample_counts(len(kept), bootstrap, seed, None if clusters is None else clusters[kept])
        refits = minimise(problem, start, weights)
        misses = np.full(len(held), np.nan)
        freedom = len(kept) - len(problem.coordinates.names)
        misses[kept] = np.log(problem.loss / problem.law.predict(best)[0])[kept] * math.sqrt(len(kept) / freedom)
        misses -= np.nanmean(misses)  # those of a Huber loss are not centred
        scatter = np.exp(resample_residuals(misses, bootstrap, seed + 1, clusters))  # not with the same random numbers
        good = ~refits.failed
        interval = percentile_interval((problem.law.predict(refits.points[good]) * scatter[good])[:, held].mean(axis=1))
    about = {"quantity": "loss", "budget": float(scale[held].min()), "n": int(held.sum()), "interval": interval}
    return HoldOut.of(problem.loss[held], predicted, **about)


def _outliers(problem: Problem, point: np.ndarray, rows: pd.Index) -> tuple[str, ...]:
    """A warning that names runs far from the law and gives the coefficients without them; they stay in the fit."""
    residuals = problem.residuals(problem.law.predict(point[None]))[0]
    distance = np.abs(residuals - np.median(residuals))
    far = distance > OUTLIER * max(1.4826 * float(np.median(distance)), SMALLEST_SCATTER)
    if not far.any():
        return ()
    refitted = minimise(problem, point, (~far)[None].astype(float)).points[0]
    without = ", ".join(f"{name} {value:.4g}" for name, value in problem.coordinates.coefficients(refitted).items())
    return (f"{far.sum()} runs far from the law, kept: {name_rows(rows[far])}; without them {without}",)
