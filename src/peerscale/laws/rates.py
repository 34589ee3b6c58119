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
from scipy.stats import f as fisher
from scipy.stats import t as student

from peerscale.errors import UserError
from peerscale.laws.fitting import LEVEL, fields_to_plain, positive_columns, require_column, row_labels
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

    def predict(self, width: float = 1.0, tokens: float = 1.0, batch: float = 1.0) -> float:
        """The best rate."""
        return (
            self.m
            * (width / self.width_0) ** -self.a
            * (tokens / self.tokens_0) ** -self.b
            * (batch / self.batch_0) ** self.c
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutRate:
    """A curve that the law was not fitted to."""

    curve: str
    n: int
    """Runs on it."""
    best: float
    """Its own best rate, from its parabola with the law's curvature."""
    predicted: float
    cost: float
    """Loss at the predicted rate less the lowest of its parabola, nats per token."""


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
    held_out: tuple[HeldOutRate, ...]
    """Curves of `hold_out`; else each in turn, predicted from the curves of other models."""
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
    """Index of each run's curve."""
    method: Array
    """Index of each run's method."""
    z: Array
    """(n, variables): ln(variable / its reference), with the sign of its exponent."""

    def of(self, rows: Array) -> Self:
        return replace(self, **{item.name: getattr(self, item.name)[rows] for item in fields(self)})

    def places(self, n_methods: int, *, own: bool) -> Array:
        """(n, coefficients): what ln best is linear in: a method's ln m and exponents, shared or one's own."""
        one = (self.method[:, None] == np.arange(n_methods)).astype(float)
        exponents = (one[:, :, None] * self.z[:, None]).reshape(len(self.x), -1) if own else self.z
        return np.hstack([one, exponents])


@dataclass(frozen=True, kw_only=True)
class _Regression:
    """loss = lowest_curve + k x^2 - 2 x (places . k theta), by ordinary least squares."""

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
    def of(cls, runs: _Runs, places: Array) -> "_Regression":
        columns = np.column_stack([runs.x**2, -2 * runs.x[:, None] * places])
        _, curve = np.unique(runs.curve, return_inverse=True)
        counts = np.bincount(curve)
        centred, y = columns.copy(), runs.loss - (np.bincount(curve, runs.loss) / counts)[curve]
        for column in centred.T:  # the level of a curve is its own
            column -= (np.bincount(curve, column) / counts)[curve]
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
    of = dict(zip(variables, values, strict=True))
    reference = {name: float(f"{np.exp(np.log(column).mean()):.2g}") for name, column in of.items()}
    logs = [SIGNS[name] * np.log(column / reference[name]) for name, column in of.items()]
    columns = [*variables.values()]
    names = list(dict.fromkeys(table[by].astype(str))) if by else ["all"]
    told = [*([by] if by else []), *columns, *curve]
    labels = (
        table[told].map(lambda value: f"{value:g}" if isinstance(value, float) else str(value)).agg(" ".join, axis=1)
    )
    runs = _Runs(
        x=np.log(rates), loss=losses, curve=row_labels(labels.to_frame("curve"), "curve"),
        method=np.array([names.index(str(name)) for name in table[by]]) if by else np.zeros(len(table), int),
        z=np.column_stack(logs) if logs else np.empty((len(table), 0)),
    )  # fmt: skip
    held = np.zeros(len(table), bool) if hold_out is None else hold_out.to_numpy(bool)
    near, at_edge = _near_the_lowest(runs, reach)
    fitted = runs.of(near & ~held)
    if not len(fitted.x) or max(len(np.unique(fitted.x[fitted.curve == one])) for one in fitted.curve) < MIN_RATES:
        raise UserError(f"no curve has {MIN_RATES} rates near its lowest loss, as many as a parabola needs")
    shared = _Regression.of(fitted, fitted.places(len(names), own=False))
    if not shared.determined:
        which = f" of {', '.join(columns)}" if columns else ""
        raise UserError(
            f"the rates do not determine the exponents{which}: a column that never varies is to be left out"
        )
    if not shared.k > 0:
        raise UserError("the losses do not rise on both sides of a best rate: try lower and higher rates")
    own = _Regression.of(fitted, fitted.places(len(names), own=True))
    if len(names) == 1 or not variables or not own.determined or not own.k > 0:
        own = None
    models = row_labels(table[columns].astype(str).agg(" ".join, axis=1).to_frame("model"), "model")
    split = [held] if held.any() else [models == model for model in np.unique(models)]
    said = [f"{(~near).sum()} runs beyond {reach:g} times a curve's best rate left out"] * (not near.all())
    if edges := dict.fromkeys(labels[at_edge & ~held]):
        said.append(f"the lowest loss is at the edge of the rates tried: {', '.join(edges)}")
    laws, intervals = _laws(shared, names, reference, own=False)
    return RateFit(
        n=len(fitted.x), n_curves=len(np.unique(fitted.curve)), laws=laws, ci=intervals,
        own=_laws(own, names, reference, own=True)[0] if own else None, equal_exponents=_f_test(shared, own),
        curvature=shared.k, curvature_se=math.sqrt(shared.covariance[0, 0]), df=shared.df,
        scatter=math.sqrt(shared.rss / shared.df) if shared.df else math.nan,
        fitted={name: (float(column[near & ~held].min()), float(column[near & ~held].max())) for name, column in of.items()},
        held_out=tuple(one for rows in split for one in _held_out(runs, near, rows, len(names), labels.to_numpy())),
        warnings=tuple(said),
    )  # fmt: skip


def _near_the_lowest(runs: "_Runs", reach: float) -> tuple[Array, Array]:
    """(n,) each: runs within `reach` of the rate with their curve's lowest loss; and those lowest at an edge."""
    near, at_edge = np.zeros(len(runs.x), bool), np.zeros(len(runs.x), bool)
    for curve in np.unique(runs.curve):
        rows = np.flatnonzero(runs.curve == curve)
        lowest = rows[runs.loss[rows].argmin()]
        near[rows] = np.abs(runs.x[rows] - runs.x[lowest]) <= math.log(reach)
        at_edge[lowest] = runs.x[lowest] in (runs.x[rows].min(), runs.x[rows].max())
    return near, at_edge


def _laws(
    fit: _Regression, names: Sequence[str], reference: Mapping[str, float], *, own: bool
) -> tuple[dict[str, RateLaw], dict[str, dict[str, tuple[float, float]]]]:
    """The law of each method, and the intervals of its coefficients."""
    laws, intervals = {}, {}
    for i, name in enumerate(names):
        unit = np.eye(len(fit.products))
        first = len(names) + i * len(reference) * own
        log_m, (low, high) = fit.ratio(unit[i])
        exponents = {EXPONENTS[variable]: fit.ratio(unit[first + j]) for j, variable in enumerate(reference)}
        laws[name] = RateLaw(
            m=math.exp(log_m), **{key: value for key, (value, _) in exponents.items()},
            **{f"{variable}_0": value for variable, value in reference.items()},
        )  # fmt: skip
        intervals[name] = {"m": (math.exp(low), math.exp(high))} | {key: ci for key, (_, ci) in exponents.items()}
    return laws, intervals


def _f_test(shared: _Regression, own: _Regression | None) -> dict[str, Any] | None:
    if own is None or not own.df:
        return None
    constraints = shared.df - own.df
    f = (shared.rss - own.rss) / constraints / (own.rss / own.df)
    return {"f": f, "df": (constraints, own.df), "p": float(fisher.sf(f, constraints, own.df))}


def _held_out(runs: "_Runs", near: Array, held: Array, n_methods: int, labels: Array) -> list[HeldOutRate]:
    """The curves among `held` (n,) with two rates or more, predicted from the runs that are not; none if they can't."""
    rest = runs.of(near & ~held)
    places = runs.places(n_methods, own=False)
    law = _Regression.of(rest, places[near & ~held])
    if not (law.determined and law.k > 0):
        return []
    found = []
    for curve in dict.fromkeys(runs.curve[held]):
        rows = np.flatnonzero(near & (runs.curve == curve))
        if len(rows) < 2:
            continue
        slope = np.polyfit(runs.x[rows], runs.loss[rows] - law.k * runs.x[rows] ** 2, 1)[0]
        best, predicted = -slope / (2 * law.k), float(places[rows[0]] @ law.products) / law.k
        found.append(
            HeldOutRate(
                curve=labels[rows[0]],
                n=len(rows),
                best=math.exp(best),
                predicted=math.exp(predicted),
                cost=law.k * (predicted - best) ** 2,
            )  # fmt: skip
        )
    return found
