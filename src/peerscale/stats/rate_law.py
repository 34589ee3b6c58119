"""The best learning rate as a law of model width, training tokens and batch size.

A curve is the losses of one model trained with several rates, all else being equal. Near its minimum it is a parabola
in the logarithm of the rate, and its minimum follows a power law:

    loss = lowest + k (ln lr - ln best)^2,    best = m (width / width_0)^-a (tokens / tokens_0)^-b (batch / batch_0)^c

Each curve has its own `lowest`, so that methods, sizes and seeds with any loss can be fitted together; each method has
its own m. All curves share the curvature k; methods either share the exponents or have their own. When multiplied out,
the loss is linear in `lowest`, k, 2 k ln m, 2 k a, 2 k b and 2 k c, so one linear regression gives all of them. Every
coefficient of the law is a ratio of two results of the regression, with Fieller's interval (1954). Bjorck et al. 2024
and StepLaw (Li et al. 2025) use the same form, but fit it to minima rather than losses.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pandas as pd

from peerscale.errors import UserError
from peerscale.laws.fitting import fields_to_plain, to_plain
from peerscale.laws.least_squares import FitStatus
from peerscale.laws.linear_fit import Array, LinearFit
from peerscale.laws.table import positive_columns, require_column
from peerscale.stats.rate_parabolas import REACH, opens_upwards, parabolas, row_groups, within_reach

MIN_RATES = 3
EQUAL_UNLESS = 0.01
"""Methods share exponents unless the F test against separate exponents has a p-value below this."""
EXPONENTS = {"width": "a", "tokens": "b", "batch": "c"}
SIGNS = {"width": -1.0, "tokens": -1.0, "batch": 1.0}
"""The best rate falls with width and tokens and grows with the batch."""


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
    ci: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """95 % intervals of m and the exponents, from the misfit of parabolas and law; infinite if the data do not bound
    them. They include the scatter that seeds cause within a curve, but no shift common to a whole curve."""

    def predict(self, width: float | None = None, tokens: float | None = None, batch: float | None = None) -> float:
        """The best rate; variables that are not given are at their reference values."""
        by_width = ((width or self.width_0) / self.width_0) ** -self.a
        by_tokens = ((tokens or self.tokens_0) / self.tokens_0) ** -self.b
        return self.m * by_width * by_tokens * ((batch or self.batch_0) / self.batch_0) ** self.c

    @property
    def unbounded(self) -> list[str]:
        """The coefficients whose interval is infinite."""
        return [key for key, ends in self.ci.items() if not np.isfinite(ends).all()]


@dataclass(frozen=True, kw_only=True, slots=True)
class CurveOptimum:
    """The minimum of one curve. Two rates are enough for it if other curves determine the curvature."""

    at: Mapping[str, Any]
    """The curve's method, width, tokens, batch and other distinguishing columns, by column."""
    n: int
    """Number of runs on the curve."""
    best: float
    """The curve's own best rate."""
    lowest: float
    """The loss at the best rate."""
    predicted: float
    """The best rate by the law."""
    cost: float
    """Loss at the predicted rate minus the lowest."""

    @property
    def name(self) -> str:
        return _name(self.at)


@dataclass(frozen=True, kw_only=True)
class RateFit:
    """Laws of all methods, from one regression."""

    law = "rates"
    n: int
    """Number of fitted runs; runs outside `reach` are left out."""
    n_curves: int
    shared: Mapping[str, RateLaw]
    """The laws by method, with shared exponents."""
    own: Mapping[str, RateLaw] | None
    """The laws by method, with separate exponents; None if the data do not determine them."""
    equal_exponents: Mapping[str, Any] | None
    """F test of shared exponents against each method's own: `f`, `df`, `p`."""
    exponents: Literal["shared", "own"]
    """Which of the two the test chooses (`EQUAL_UNLESS`). All fields below belong to that fit."""
    curvature: float
    """k, nats per (ln lr)^2."""
    curvature_se: float
    scatter: float
    """Standard deviation of the losses around the fit, in nats."""
    df: int
    fitted: Mapping[str, tuple[float, float]]
    """Lowest and highest width, tokens and batch among the runs: the law is not tested outside this range."""
    curves: tuple[CurveOptimum, ...]
    """The fitted curves that have at least two rates."""
    hold_out_given: bool
    """Whether runs were set aside to test the law."""
    held_out: tuple[CurveOptimum, ...]
    """The curves of these runs; if there are none, every curve, predicted from the curves of other models."""
    warnings: tuple[str, ...]

    @property
    def laws(self) -> Mapping[str, RateLaw]:
        """The laws by method, with the exponents that the test chooses."""
        return self.own if self.own and self.exponents == "own" else self.shared

    @property
    def held_out_cost(self) -> float:
        """Mean cost of the predicted rates on held-out curves in nats per token; NaN if there are none."""
        return float(np.mean([one.cost for one in self.held_out])) if self.held_out else math.nan

    @property
    def held_out_error(self) -> float:
        """Root mean square of ln(predicted / best) over held-out curves; NaN if there are none."""
        logs = [math.log(one.predicted / one.best) for one in self.held_out]
        return float(np.sqrt(np.mean(np.square(logs)))) if logs else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: under `groups` the law of each method, with the exponents chosen by `exponents`.

        Each law also has both versions: `shared` and, if the data determine it, `own`.
        """
        plain, groups = fields_to_plain(self), {}
        both = {key: laws for key in ("shared", "own") if (laws := plain.pop(key))}
        for name, law in self.laws.items():
            status = FitStatus.NOT_IDENTIFIABLE if law.unbounded else FitStatus.CONVERGED
            versions = {key: laws[name] for key, laws in both.items()}
            groups[name] = {"law": self.law, "status": str(status), "bootstrap": None, **to_plain(law), **versions}
        errors = to_plain({"held_out_error": self.held_out_error, "held_out_cost": self.held_out_cost})
        return {"law": self.law} | plain | errors | {"by": "method", "groups": groups}


@dataclass(frozen=True, kw_only=True)
class _Runs:
    """Runs (n,), with the values that the law uses."""

    x: Array
    """ln lr."""
    loss: Array
    curve: Array
    """Index of each run's curve."""
    at: list[dict[str, Any]]
    """Of each run, see `CurveOptimum.at`."""
    near: Array
    """Whether the run is within `reach`, so that the parabola describes it."""
    is_method: Array
    """(n, methods)."""
    z: Array
    """(n, variables): the logarithms that the exponents multiply, 0 at the reference."""
    apart: Sequence[bool]
    """(variables,): whether each method has an exponent of its own."""

    def places(self, is_method: Array, z: Array) -> Array:
        """(n, coefficients): ln best is their product with ln m of each method, then the exponents."""
        by_variable = zip(z.T[:, :, None], self.apart, strict=True)
        return np.hstack([is_method, *(is_method * one if apart else one for one, apart in by_variable)])

    def fit(self, which: Array) -> LinearFit:
        """The parabolas of the runs `which` (n,)."""
        places = self.places(self.is_method[which], self.z[which])
        return parabolas(self.x[which], self.loss[which], self.curve[which], places)

    def laws(self, fit: LinearFit, methods: Sequence[str], reference: Mapping[str, float]) -> dict[str, RateLaw]:
        """The law of each method, by a fit of these runs."""
        keys, k, found = ["m", *(EXPONENTS[each] for each in reference)], np.eye(1, len(fit.coefficients))[0], {}
        z = np.eye(len(keys))[:, 1:]  # at the reference, then off it by one in each variable
        for name, one in zip(methods, np.eye(len(methods)), strict=True):
            log_m, *others = np.pad(self.places(np.tile(one, (len(keys), 1)), z), ((0, 0), (1, 0)))
            ratios = [fit.ratio(log_m, k), *(fit.ratio(other - log_m, k) for other in others)]
            ratios[0] = float(np.exp(ratios[0][0])), tuple(np.exp(ratios[0][1]).tolist())
            values, ci = (dict(zip(keys, part, strict=True)) for part in zip(*ratios, strict=True))
            found[name] = RateLaw(**values, **{f"{each}_0": value for each, value in reference.items()}, ci=ci)
        return found

    def optima(self, which: Array, law: LinearFit) -> tuple[CurveOptimum, ...]:
        """The minima of the curves among `which` (n,) with at least two rates, using the curvature of the law."""
        k, *products = law.coefficients
        predicted, found = self.places(self.is_method, self.z) @ products / k, []
        for curve in dict.fromkeys(self.curve[which]):
            rows = np.flatnonzero(self.near & (self.curve == curve))
            x = self.x[rows]
            line = LinearFit(design=np.stack([x, np.ones_like(x)], axis=1), values=self.loss[rows] - k * x**2)
            if not line.determined:
                continue
            slope, level = line.coefficients
            best, by_law = -slope / (2 * k), predicted[rows[0]]
            found.append(
                CurveOptimum(
                    at=self.at[rows[0]], n=len(rows), best=float(np.exp(best)), predicted=float(np.exp(by_law)),
                    lowest=float(level - k * best**2), cost=float(k * (by_law - best) ** 2),
                )
            )  # fmt: skip
        return tuple(found)

    def predicted(self, out: Array) -> tuple[CurveOptimum, ...]:
        """The optima of the curves among `out` (n,), with the law of the other runs; none if that is not determined."""
        rest = self.near & ~out
        law = self.fit(rest) if rest.any() else None
        return self.optima(out, law) if law and opens_upwards(law) else ()


def fit_rates(
    table: pd.DataFrame, *, lr: str = "lr", loss: str = "loss", width: str | None = None, tokens: str | None = None,
    batch: str | None = None, by: str | None = None, curve: Sequence[str] = (), hold_out: pd.Series | None = None,
    reach: float = REACH, equal_unless: float = EQUAL_UNLESS,
) -> RateFit:  # fmt: skip
    """Fit the law of the best rate to runs.

    Args:
        table: one row per run.
        lr, loss: columns of the peak rate used in training and of the loss in nats per token.
        width, tokens, batch: columns of variables of the law; None: the law does not depend on the variable.
        by: column of the method; each method has its own m.
        curve: further columns in which the runs of one curve are equal, such as a seed or another rate.
        hold_out: boolean, with the table's index: rows that test the law and that it is not fitted to. None: every
            model (width, tokens, batch) is left out in turn.
        reach, equal_unless: see `REACH` and `EQUAL_UNLESS`.

    Raises:
        UserError: a column is missing or has values that are not positive numbers; no curve has three rates; the losses
            do not rise on both sides of a minimum; or a variable does not vary, or only together with another.
    """
    variables = {name: column for name, column in zip(EXPONENTS, (width, tokens, batch), strict=True) if column}
    rates, losses, *values = positive_columns(table, lr, loss, *variables.values(), law=RateFit.law, at_least=MIN_RATES)
    distinct = [*([by] if by else []), *variables.values(), *curve]
    for column in distinct:
        require_column(table, column)
    told = dict(zip(variables, values, strict=True))
    # m is the best rate here: in the midst of the runs, and at the batch that most of them have.
    reference = {name: float(f"{np.exp(np.log(each).mean()):.2g}") for name, each in told.items()}
    if batch:
        reference["batch"] = float(pd.Series(told["batch"]).mode().iloc[0])
    x, curves = np.log(rates), row_groups(table, distinct)
    by_curve = pd.DataFrame({"x": x, "loss": losses}).groupby(curves)
    lowest = by_curve["loss"].transform("idxmin").to_numpy()
    methods = table[by].map(str) if by else pd.Series("all", table.index)  # missing values as a method of their own
    of_method, found = pd.factorize(methods.to_numpy())
    names = found.tolist()
    logs = [SIGNS[name] * np.log(each / reference[name]) for name, each in told.items()]
    rows = _Runs(
        x=x, loss=losses, curve=curves,
        at=[dict(zip(distinct, row, strict=True)) for row in table[distinct].itertuples(index=False)],
        near=within_reach(x, x[lowest], reach), is_method=np.eye(len(names))[of_method],
        z=np.array(logs).reshape(len(logs), len(table)).T, apart=[False] * len(logs),
    )  # fmt: skip
    held = np.zeros(len(table), bool) if hold_out is None else hold_out.to_numpy(bool)
    fitted = rows.near & ~held
    if not (pd.Series(x[fitted]).groupby(curves[fitted]).nunique() >= MIN_RATES).any():
        raise UserError(f"no curve has {MIN_RATES} rates near its lowest loss, as many as a parabola needs")
    shared = rows.fit(fitted)
    if not shared.determined:
        which = ", ".join(variables.values())
        raise UserError(f"these runs do not determine the exponents of {which}: leave out a column that hardly varies")
    if not opens_upwards(shared):
        raise UserError("the losses do not rise on both sides of a best rate: try lower and higher rates")
    # The exponent of a variable that only one method varies, such as the batch, stays shared.
    each = [fitted & (of_method == i) for i in range(len(names))]
    apart = replace(rows, apart=[all(len(np.unique(z[mine])) > 1 for mine in each) for z in rows.z.T])
    own = apart.fit(fitted) if len(names) > 1 and any(apart.apart) else None
    own = own if own and opens_upwards(own) else None
    equal = own.f_test(shared) if own else None
    differ = bool(own and equal and equal["p"] < equal_unless)
    law, chosen = (own, apart) if own and differ else (shared, rows)
    warnings = [f"{(~rows.near).sum()} runs beyond {reach:g} times a curve's best rate left out"]
    warnings = warnings * (not rows.near.all())
    several = by_curve["x"].transform("nunique") >= MIN_RATES
    at_end = (x == by_curve["x"].transform("min")) | (x == by_curve["x"].transform("max"))
    edges = np.flatnonzero(fitted & (np.arange(len(x)) == lowest) & several & at_end)
    if len(edges):
        warnings.append(
            f"the lowest loss is at the edge of the rates tried: {', '.join(_name(rows.at[i]) for i in edges)}"
        )
    models = row_groups(table, list(variables.values()))
    split = [held] if held.any() else [models == model for model in np.unique(models)]
    held_out = tuple(one for out in split for one in chosen.predicted(out))
    if not held_out:
        warnings.append("no held-out error: the other curves do not determine the law")
    curvature = law.estimate(np.eye(len(law.coefficients))[0])
    found = RateFit(
        n=int(fitted.sum()), n_curves=len(np.unique(curves[fitted])), shared=rows.laws(shared, names, reference),
        own=apart.laws(own, names, reference) if own else None, equal_exponents=equal,
        exponents="own" if differ else "shared", curvature=curvature.value, curvature_se=curvature.se,
        scatter=law.scatter, df=law.df,
        fitted={name: (float(each[fitted].min()), float(each[fitted].max())) for name, each in told.items()},
        curves=chosen.optima(~held, law), hold_out_given=bool(held.any()), held_out=held_out, warnings=tuple(warnings),
    )  # fmt: skip
    if loose := [f"{key} of {name}" for name, one in found.laws.items() for key in one.unbounded]:
        line = f"the runs do not bound {', '.join(loose)}: their intervals are infinite"
        return replace(found, warnings=(*found.warnings, line))
    return found


def _name(at: Mapping[str, Any]) -> str:
    return " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in at.values())
