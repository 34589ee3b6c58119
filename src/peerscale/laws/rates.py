"""The best learning rate as a law of the model's width, the tokens of training and the batch.

A curve is the losses of one model trained with several rates, all else equal. Near its minimum it is a parabola in the
logarithm of the rate, and its minimum follows a power law:

    loss = lowest + k (ln lr - ln best)^2,    best = m (width / width_0)^-a (tokens / tokens_0)^-b (batch / batch_0)^c

`lowest` is each curve's own, so that methods, sizes and seeds of any loss can be fitted together; m is each method's
own, and the curvature k is shared by all curves, the exponents by all methods or not. Multiplied out, the loss is
linear in `lowest`, k and 2 k ln m, 2 k a, 2 k b, 2 k c: one linear regression gives them, and every coefficient of the
law is a ratio of two of its results, whose interval is Fieller's (1954). The form is that of Bjorck et al. 2024 and of
StepLaw (Li et al. 2025), who fit minima rather than losses.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import pandas as pd
from scipy.stats import t as student

from peerscale.errors import UserError
from peerscale.laws.fitting import LEVEL, fields_to_plain, positive_columns, require_column
from peerscale.laws.optima import f_test
from peerscale.laws.solver import Array

MIN_RATES = 3
REACH = 3.2
"""A parabola describes a curve within this factor of the best rate that was tried."""
SIGNS = {"width": -1.0, "tokens": -1.0, "batch": 1.0}
"""Of the exponents: the best rate falls with width and tokens and grows with the batch."""
EXPONENTS = {"width": "a", "tokens": "b", "batch": "c"}


@dataclass(frozen=True, kw_only=True, slots=True)
class RateLaw:
    """lr = m (width / width_0)^-a (tokens / tokens_0)^-b (batch / batch_0)^c of one method."""

    m: float
    a: float = 0.0
    b: float = 0.0
    c: float = 0.0
    width_0: float = 1.0
    tokens_0: float = 1.0
    batch_0: float = 1.0

    def predict(self, width: float | None = None, tokens: float | None = None, batch: float | None = None) -> float:
        """The best rate; what is not given is at its reference."""
        by_width = ((width or self.width_0) / self.width_0) ** -self.a
        by_tokens = ((tokens or self.tokens_0) / self.tokens_0) ** -self.b
        return self.m * by_width * by_tokens * ((batch or self.batch_0) / self.batch_0) ** self.c


@dataclass(frozen=True, kw_only=True, slots=True)
class CurveOptimum:
    """The minimum of one curve, two rates of which are enough where others give the curvature."""

    at: Mapping[str, Any]
    """Its method, width, tokens, batch and what else tells it from others, by column."""
    n: int
    """Runs on it."""
    best: float
    """Its own best rate."""
    lowest: float
    """The loss there."""
    predicted: float
    """The best rate by the law."""
    cost: float
    """Loss at the predicted rate less the lowest."""

    @property
    def name(self) -> str:
        return " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in self.at.values())


@dataclass(frozen=True, kw_only=True)
class RateFit:
    """Laws of all methods, by one regression."""

    law = "rates"
    n: int
    """Runs that were fitted; those beyond the parabola's reach are left out."""
    n_curves: int
    laws: Mapping[str, RateLaw]
    """By method, with the exponents that all share."""
    ci: Mapping[str, Mapping[str, tuple[float, float]]]
    """By method: 95 % intervals of m and the exponents, of the misfit of parabolas and law; infinite where the data do
    not bound them. Seeds are in it as far as they scatter a curve's runs, not by what one curve has in common."""
    own: Mapping[str, RateLaw] | None
    """With exponents of each method's own; None where the data do not determine them."""
    equal_exponents: Mapping[str, Any] | None
    """F test of shared exponents against each method's own: `f`, `df`, `p`."""
    curvature: float
    """k, nats per (ln lr)^2."""
    curvature_se: float
    scatter: float
    """Standard deviation of the losses about the fit, nats."""
    df: int
    fitted: Mapping[str, tuple[float, float]]
    """Lowest and highest width, tokens and batch among the runs: the law is untried elsewhere."""
    curves: tuple[CurveOptimum, ...]
    """Those that were fitted, and have two rates."""
    hold_out_given: bool
    """Whether runs were set aside to judge the law by."""
    held_out: tuple[CurveOptimum, ...]
    """Curves of those; else each in turn, predicted from the curves of other models."""
    warnings: tuple[str, ...]

    @property
    def held_out_cost(self) -> float:
        """Mean of what the predicted rates cost on held-out curves, nats per token; NaN without any."""
        return float(np.mean([one.cost for one in self.held_out])) if self.held_out else math.nan

    @property
    def held_out_error(self) -> float:
        """Root mean square of ln(predicted / best) over held-out curves; NaN without any."""
        logs = [math.log(one.predicted / one.best) for one in self.held_out]
        return float(np.sqrt(np.mean(np.square(logs)))) if logs else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: a law a method under `groups`, and what they share beside it."""
        plain = fields_to_plain(self)
        laws, ci, own = plain.pop("laws"), plain.pop("ci"), plain.pop("own")
        groups = {
            name: {"law": self.law, "status": "converged", "bootstrap": None, **laws[name], "ci": ci[name]}
            | ({"own": own[name]} if own else {})
            for name in laws
        }
        errors = {"held_out_error": self.held_out_error, "held_out_cost": self.held_out_cost}
        return {"law": self.law} | plain | errors | {"by": "method", "groups": groups}


@dataclass(frozen=True, kw_only=True)
class _Runs:
    """Runs (n,), and what the law knows of them."""

    x: Array
    """ln lr."""
    loss: Array
    curve: Array
    """Name of each run's curve."""
    model: Array
    """Width, tokens and batch, as one name."""
    method: Array
    """Index of each run's method."""
    z: Array
    """(n, variables): ln(variable / its reference), with the sign of its exponent."""
    near: Array
    """Whether the parabola describes the run."""
    at_edge: Array
    """Whether the run has the lowest loss of its curve, at the edge of the rates tried."""

    def of(self, rows: Array) -> Self:
        return replace(self, **{item.name: getattr(self, item.name)[rows] for item in fields(self)})

    def places(self, n_methods: int, *, own: bool) -> Array:
        """(n, coefficients): what ln best is linear in: a method's ln m, and exponents, shared or its own."""
        one = (self.method[:, None] == np.arange(n_methods)).astype(float)
        exponents = (one[:, :, None] * self.z[:, None]).reshape(len(self.x), -1) if own else self.z
        return np.hstack([one, exponents])

    def regression(self, n_methods: int, *, own: bool) -> "ParabolaRegression":
        """The fit of these runs."""
        return ParabolaRegression.of(self.x, self.loss, self.curve, self.places(n_methods, own=own))


@dataclass(frozen=True, kw_only=True)
class ParabolaRegression:
    """Parabolas of one curvature, loss = level_curve + k x^2 - 2 x (places . k theta), by ordinary least squares.

    The minimum of a curve lies at x = places . theta.
    """

    k: float
    products: Array
    """k theta."""
    covariance: Array
    """Of (k, k theta)."""
    rss: float
    df: int
    determined: bool
    """Whether the data determine all coefficients."""

    @classmethod
    def of(cls, x: Array, loss: Array, curves: Array, places: Array) -> Self:
        """Fit runs (n,): x = ln rate, the name of each run's curve, and `places` (n, coefficients)."""
        columns = np.column_stack([x**2, -2 * x[:, None] * places])
        _, curve = np.unique(curves, return_inverse=True)
        counts = np.bincount(curve)

        def less_mean(values: Array) -> Array:  # since the level of a curve is its own
            return values - (np.bincount(curve, values) / counts)[curve]

        centred, y = np.column_stack([less_mean(column) for column in columns.T]), less_mean(loss)
        inverse = np.linalg.pinv(centred.T @ centred, rcond=1e-12, hermitian=True)
        solution, rank = inverse @ centred.T @ y, int(np.linalg.matrix_rank(centred, tol=1e-9 * np.abs(centred).max()))
        rss, df = float(np.square(y - centred @ solution).sum()), len(y) - len(counts) - rank
        return cls(
            k=float(solution[0]), products=solution[1:], covariance=inverse * (rss / df if df > 0 else math.nan),
            rss=rss, df=df, determined=rank == columns.shape[1],
        )  # fmt: skip

    def ratio(self, weights: Array) -> tuple[float, tuple[float, float]]:
        """weights . theta with Fieller's 95 % interval; infinite where k is not told from zero."""
        u, v = float(weights @ self.products), self.k
        uu = float(weights @ self.covariance[1:, 1:] @ weights)
        uv, vv = float(weights @ self.covariance[1:, 0]), float(self.covariance[0, 0])
        t = float(student.ppf((1 + LEVEL) / 2, self.df)) ** 2 if self.df > 0 else math.nan
        quadratic, linear, constant = v * v - t * vv, u * v - t * uv, u * u - t * uu
        root = linear * linear - quadratic * constant
        if not (quadratic > 0 and root >= 0):
            return u / v, (-math.inf, math.inf)
        half = math.sqrt(root)
        return u / v, ((linear - half) / quadratic, (linear + half) / quadratic)


def fit_rates(
    table: pd.DataFrame, *, lr: str = "lr", loss: str = "loss", width: str | None = None, tokens: str | None = None,
    batch: str | None = None, by: str | None = None, curve: Sequence[str] = (), hold_out: pd.Series | None = None,
    reach: float = REACH,
) -> RateFit:  # fmt: skip
    """Fit the law of the best rate to runs, one a row.

    Args:
        table: the runs.
        lr, loss: columns of the peak rate as it was used and of the loss, nats per token.
        width, tokens, batch: columns of what the best rate may depend on; None: the law leaves it out.
        by: column of the method, whose m is its own.
        curve: further columns in which the runs of one curve are equal, such as a seed or another rate.
        hold_out: which rows (boolean, of the table's index) the law is judged by and not fitted to. None: every model
            (width, tokens, batch) is left out in turn.
        reach: see `REACH`.

    Raises:
        UserError: a column is missing or holds what is no positive number; no curve has three rates; the losses do not
            rise on both sides of a minimum; or a variable does not vary, or only together with another.
    """
    variables = {name: column for name, column in zip(SIGNS, (width, tokens, batch), strict=True) if column}
    rates, losses, *values = positive_columns(table, lr, loss, *variables.values(), law=RateFit.law, at_least=MIN_RATES)
    for column in (by, *curve):
        if column is not None:
            require_column(table, column)
    methods = table[by].astype(str) if by else pd.Series("all", table.index)
    names = list(dict.fromkeys(methods))
    told = _Told(dict(zip(variables, values, strict=True)))
    rows = _runs(table, rates, losses, methods, told, [*variables.values()], curve, reach)
    told_apart = [*([by] if by else []), *variables.values(), *curve]
    places = [dict(zip(told_apart, row, strict=True)) for row in table[told_apart].itertuples(index=False)]
    held = np.zeros(len(table), bool) if hold_out is None else hold_out.to_numpy(bool)
    fitted = rows.of(rows.near & ~held)
    if not any(len(np.unique(fitted.x[fitted.curve == one])) >= MIN_RATES for one in np.unique(fitted.curve)):
        raise UserError(f"no curve has {MIN_RATES} rates near its lowest loss, as many as a parabola needs")
    shared = fitted.regression(len(names), own=False)
    if not shared.determined:
        which = ", ".join(variables.values())
        raise UserError(f"these runs do not determine the exponents of {which}: leave out a column that hardly varies")
    if not shared.k > 0:
        raise UserError("the losses do not rise on both sides of a best rate: try lower and higher rates")
    own = fitted.regression(len(names), own=True)
    if len(names) == 1 or not variables or not own.determined or not own.k > 0:
        own = None
    said = [f"{(~rows.near).sum()} runs beyond {reach:g} times a curve's best rate left out"] * (not rows.near.all())
    if edges := ", ".join(fitted.curve[fitted.at_edge]):
        said.append(f"the lowest loss is at the edge of the rates tried: {edges}")
    split = [held] if held.any() else [rows.model == model for model in np.unique(rows.model)]
    equal = f_test(shared.rss, shared.df, own.rss, own.df) if own else None
    laws, intervals = _laws(shared, names, told.reference, own=False)
    return RateFit(
        n=len(fitted.x), n_curves=len(np.unique(fitted.curve)), laws=laws, ci=intervals,
        own=_laws(own, names, told.reference, own=True)[0] if own else None, equal_exponents=equal,
        curvature=shared.k, curvature_se=math.sqrt(shared.covariance[0, 0]), df=shared.df,
        scatter=math.sqrt(shared.rss / shared.df) if shared.df else math.nan, fitted=told.range(rows.near & ~held),
        hold_out_given=bool(held.any()), curves=_optima(rows, ~held, shared, len(names), places), warnings=tuple(said),
        held_out=tuple(one for out in split for one in _held_out(rows, out, len(names), places)),
    )  # fmt: skip


class _Told(dict[str, Array]):
    """Width, tokens and batch of every run, as far as the law depends on them."""

    @property
    def reference(self) -> dict[str, float]:
        """The geometric mean of each to two digits, where m is the best rate."""
        return {name: float(f"{np.exp(np.log(values).mean()):.2g}") for name, values in self.items()}

    def range(self, rows: Array) -> dict[str, tuple[float, float]]:
        return {name: (float(values[rows].min()), float(values[rows].max())) for name, values in self.items()}


def _runs(
    table: pd.DataFrame, rates: Array, losses: Array, methods: pd.Series, told: _Told, columns: Sequence[str],
    curve: Sequence[str], reach: float,
) -> _Runs:  # fmt: skip
    """The rows of the table, each with its curve, and with its distance from the curve's lowest loss judged."""

    def label(*parts: pd.Series) -> Array:
        words = [part.map(lambda value: f"{value:g}" if isinstance(value, float) else str(value)) for part in parts]
        return np.array([" ".join(row) for row in zip(*words, strict=True)]) if words else np.full(len(table), "")

    x, curves = np.log(rates), label(methods, *(table[column] for column in (*columns, *curve)))
    near, at_edge = np.zeros(len(x), bool), np.zeros(len(x), bool)
    for name in np.unique(curves):
        of_curve = np.flatnonzero(curves == name)
        lowest = of_curve[losses[of_curve].argmin()]
        near[of_curve] = np.abs(x[of_curve] - x[lowest]) <= math.log(reach)
        several = len(np.unique(x[of_curve])) >= MIN_RATES
        at_edge[lowest] = several and x[lowest] in (x[of_curve].min(), x[of_curve].max())
    reference = told.reference
    z = [SIGNS[name] * np.log(values / reference[name]) for name, values in told.items()]
    return _Runs(
        x=x, loss=losses, curve=curves, model=label(*(table[column] for column in columns)),
        method=pd.factorize(methods)[0], z=np.column_stack(z) if z else np.empty((len(x), 0)),
        near=near, at_edge=at_edge,
    )  # fmt: skip


def _laws(
    fit: ParabolaRegression, names: Sequence[str], reference: Mapping[str, float], *, own: bool
) -> tuple[dict[str, RateLaw], dict[str, dict[str, tuple[float, float]]]]:
    """The law of each method, and the intervals of its coefficients."""
    laws, intervals = {}, {}
    for i, name in enumerate(names):
        unit = np.eye(len(fit.products))
        first = len(names) + i * len(reference) * own
        log_m, (low, high) = fit.ratio(unit[i])
        exponents = {EXPONENTS[variable]: fit.ratio(unit[first + j]) for j, variable in enumerate(reference)}
        laws[name] = RateLaw(
            m=float(np.exp(log_m)), **{key: value for key, (value, _) in exponents.items()},
            **{f"{variable}_0": value for variable, value in reference.items()},
        )  # fmt: skip
        intervals[name] = {"m": (float(np.exp(low)), float(np.exp(high)))} | {
            key: ci for key, (_, ci) in exponents.items()
        }
    return laws, intervals


def _held_out(runs: _Runs, held: Array, n_methods: int, places: Sequence[dict[str, Any]]) -> tuple[CurveOptimum, ...]:
    """The optima of the curves among `held` (n,), predicted from the other runs; none if these do not determine it."""
    rest = runs.of(runs.near & ~held)
    if not len(rest.x):
        return ()
    law = rest.regression(n_methods, own=False)
    return _optima(runs, held, law, n_methods, places) if law.determined and law.k > 0 else ()


def _optima(
    runs: _Runs, which: Array, law: ParabolaRegression, n_methods: int, places: Sequence[dict[str, Any]]
) -> tuple[CurveOptimum, ...]:
    """The minima of the curves among `which` (n,) that have two rates or more, with the curvature of the law."""
    centres, found = runs.places(n_methods, own=False) @ law.products / law.k, []
    for curve in dict.fromkeys(runs.curve[which]):
        rows = np.flatnonzero(runs.near & (runs.curve == curve))
        if len(np.unique(runs.x[rows])) < 2:
            continue
        slope, level = np.polyfit(runs.x[rows], runs.loss[rows] - law.k * runs.x[rows] ** 2, 1)
        best, predicted = -slope / (2 * law.k), float(centres[rows[0]])
        found.append(
            CurveOptimum(
                at=places[rows[0]], n=len(rows), best=float(np.exp(best)), predicted=float(np.exp(predicted)),
                lowest=float(level - law.k * best**2), cost=float(law.k * (predicted - best) ** 2),
            )
        )  # fmt: skip
    return tuple(found)
