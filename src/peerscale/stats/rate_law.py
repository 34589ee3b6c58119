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
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy as np
import pandas as pd
from scipy.stats import t as student

from peerscale.errors import UserError
from peerscale.laws.fitting import fields_to_plain, to_plain
from peerscale.laws.least_squares import FitStatus
from peerscale.laws.table import positive_columns, require_column
from peerscale.stats.linear_fit import LEVEL, Array
from peerscale.stats.optima import f_test

MIN_RATES = 3
REACH = 3.2
"""A curve is fitted by a parabola within this factor of the best rate that was tried."""
EQUAL_UNLESS = 0.01
"""Methods share exponents unless the F test against separate exponents has a p-value below this."""
SIGNS = {"width": -1.0, "tokens": -1.0, "batch": 1.0}
"""Signs of the exponents: the best rate falls with width and tokens and grows with the batch."""
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
        """The best rate; variables that are not given are at their reference values."""
        by_width = ((width or self.width_0) / self.width_0) ** -self.a
        by_tokens = ((tokens or self.tokens_0) / self.tokens_0) ** -self.b
        return self.m * by_width * by_tokens * ((batch or self.batch_0) / self.batch_0) ** self.c


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
        return " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in self.at.values())


@dataclass(frozen=True, kw_only=True)
class RateFit:
    """Laws of all methods, from one regression."""

    law = "rates"
    n: int
    """Number of fitted runs; runs outside `reach` are left out."""
    n_curves: int
    laws: Mapping[str, RateLaw]
    """The laws by method, with shared exponents."""
    ci: Mapping[str, Mapping[str, tuple[float, float]]]
    """By method: 95 % intervals of m and the exponents, from the misfit of parabolas and law; infinite if the data do
    not bound them. They include the scatter that seeds cause within a curve, but no shift common to a whole curve."""
    own: Mapping[str, RateLaw] | None
    """The laws by method, with separate exponents; None if the data do not determine them."""
    own_ci: Mapping[str, Mapping[str, tuple[float, float]]] | None
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
        plain = fields_to_plain(self)
        laws, ci, own, own_ci = (plain.pop(key) for key in ("laws", "ci", "own", "own_ci"))
        groups = {}
        for name in laws:
            both = {"shared": {**laws[name], "ci": ci[name]}} | (
                {"own": {**own[name], "ci": own_ci[name]}} if own else {}
            )
            chosen = both[self.exponents]
            status = FitStatus.NOT_IDENTIFIABLE if unbounded(chosen["ci"]) else FitStatus.CONVERGED
            groups[name] = {"law": self.law, "status": str(status), "bootstrap": None, **chosen, **both}
        errors = to_plain({"held_out_error": self.held_out_error, "held_out_cost": self.held_out_cost})
        return {"law": self.law} | plain | errors | {"by": "method", "groups": groups}


@dataclass(frozen=True, kw_only=True)
class ParabolaRegression:
    """Parabolas with one curvature, loss = level_curve + k x^2 - 2 x (places . k theta), by ordinary least squares.

    The minimum of a curve is at x = places . theta.
    """

    k: float
    products: Array
    """k theta."""
    covariance: Array
    """Covariance of (k, k theta)."""
    rss: float
    df: int
    determined: bool
    """Whether the data determine all coefficients."""

    @classmethod
    def of(cls, x: Array, loss: Array, curves: Array, places: Array) -> Self:
        """Fit runs (n,): x = ln rate, the name of each run's curve, and `places` (n, coefficients)."""
        columns = pd.DataFrame(np.column_stack([loss, x**2, -2 * x[:, None] * places]))
        by_curve = columns.groupby(curves)  # centring removes the level of each curve
        centred = (columns - by_curve.transform("mean")).to_numpy()
        y, design = centred[:, 0], centred[:, 1:]
        inverse = np.linalg.pinv(design.T @ design, rcond=1e-12, hermitian=True)
        solution, rank = inverse @ design.T @ y, int(np.linalg.matrix_rank(design, tol=1e-9 * np.abs(design).max()))
        rss, df = float(np.square(y - design @ solution).sum()), len(y) - by_curve.ngroups - rank
        return cls(
            k=float(solution[0]), products=solution[1:], covariance=inverse * (rss / df if df > 0 else math.nan),
            rss=rss, df=df, determined=rank == design.shape[1],
        )  # fmt: skip

    @property
    def k_se(self) -> float:
        """Standard error of the curvature."""
        return math.sqrt(self.covariance[0, 0])

    @property
    def scatter(self) -> float:
        """Standard deviation of the losses around the parabolas; NaN without degrees of freedom."""
        return math.sqrt(self.rss / self.df) if self.df else math.nan

    def ratio(self, i: int) -> tuple[float, tuple[float, float]]:
        """theta_i with Fieller's 95 % interval; infinite if k cannot be distinguished from zero."""
        u, v = float(self.products[i]), self.k
        uu, uv, vv = (float(self.covariance[place]) for place in ((1 + i, 1 + i), (1 + i, 0), (0, 0)))
        t = float(student.ppf((1 + LEVEL) / 2, self.df)) ** 2 if self.df > 0 else math.nan
        quadratic, linear, constant = v * v - t * vv, u * v - t * uv, u * u - t * uu
        if not quadratic > 0:
            return u / v, (-math.inf, math.inf)
        half = math.sqrt(max(linear * linear - quadratic * constant, 0.0))  # negative only through rounding
        return u / v, ((linear - half) / quadratic, (linear + half) / quadratic)


@dataclass(frozen=True, kw_only=True)
class _Runs:
    """Runs (n,), with the values that the law uses."""

    x: Array
    """ln lr."""
    loss: Array
    curve: Array
    """Name of each run's curve."""
    near: Array
    """Whether the run is within `reach`, so that the parabola describes it."""
    places: Array
    """(n, coefficients): ln best = places . theta, where theta is ln m of each method and the exponents."""
    at: list[dict[str, Any]]
    """Of each run, see `CurveOptimum.at`."""

    def regression(self, which: Array) -> ParabolaRegression:
        """The fit of the runs `which` (n,)."""
        return ParabolaRegression.of(self.x[which], self.loss[which], self.curve[which], self.places[which])

    def optima(self, which: Array, law: ParabolaRegression) -> tuple[CurveOptimum, ...]:
        """The minima of the curves among `which` (n,) with at least two rates, using the curvature of the law."""
        found = []
        for curve in dict.fromkeys(self.curve[which]):
            rows = np.flatnonzero(self.near & (self.curve == curve))
            if len(np.unique(self.x[rows])) < 2:
                continue
            slope, level = np.polyfit(self.x[rows], self.loss[rows] - law.k * self.x[rows] ** 2, 1)
            best, predicted = -slope / (2 * law.k), float(self.places[rows[0]] @ law.products / law.k)
            found.append(
                CurveOptimum(
                    at=self.at[rows[0]], n=len(rows), best=float(np.exp(best)), predicted=float(np.exp(predicted)),
                    lowest=float(level - law.k * best**2), cost=float(law.k * (predicted - best) ** 2),
                )
            )  # fmt: skip
        return tuple(found)

    def predicted(self, out: Array) -> tuple[CurveOptimum, ...]:
        """The optima of the curves among `out` (n,), with the law of the other runs; none if that is not determined."""
        rest = self.near & ~out
        law = self.regression(rest) if rest.any() else None
        return self.optima(out, law) if law and law.determined and law.k > 0 else ()


def fit_rates(
    table: pd.DataFrame, *, lr: str = "lr", loss: str = "loss", width: str | None = None, tokens: str | None = None,
    batch: str | None = None, by: str | None = None, curve: Sequence[str] = (), hold_out: pd.Series | None = None,
    reach: float = REACH,
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
        reach: see `REACH`.

    Raises:
        UserError: a column is missing or has values that are not positive numbers; no curve has three rates; the losses
            do not rise on both sides of a minimum; or a variable does not vary, or only together with another.
    """
    variables = {name: column for name, column in zip(SIGNS, (width, tokens, batch), strict=True) if column}
    columns = [*variables.values()]
    rates, losses, *values = positive_columns(table, lr, loss, *columns, law=RateFit.law, at_least=MIN_RATES)
    for column in filter(None, (by, *curve)):
        require_column(table, column)
    methods = table[by].map(str) if by else pd.Series("all", table.index)  # missing values as a method of their own
    of_method, names = pd.factorize(methods.to_numpy())
    told = dict(zip(variables, values, strict=True))
    # m is the best rate here: in the midst of the runs, and at the batch that most of them have.
    reference = {name: float(f"{np.exp(np.log(each).mean()):.2g}") for name, each in told.items()}
    if batch:
        reference["batch"] = float(pd.Series(told["batch"]).mode().iloc[0])
    logs = [SIGNS[name] * np.log(each / reference[name]) for name, each in told.items()]
    one, z = np.eye(len(names))[of_method], np.array(logs).reshape(len(logs), len(table)).T
    x, curves = np.log(rates), _names(methods, *(table[column] for column in (*columns, *curve)))
    by_curve = pd.DataFrame({"x": x, "loss": losses}).groupby(curves)
    lowest = by_curve["loss"].transform("idxmin").to_numpy()
    told_apart = [*([by] if by else []), *columns, *curve]
    rows = _Runs(
        x=x, loss=losses, curve=curves, near=within_reach(x, x[lowest], reach), places=np.hstack([one, z]),
        at=[dict(zip(told_apart, row, strict=True)) for row in table[told_apart].itertuples(index=False)],
    )  # fmt: skip
    held = np.zeros(len(table), bool) if hold_out is None else hold_out.to_numpy(bool)
    fitted = rows.near & ~held
    if not (pd.Series(x[fitted]).groupby(curves[fitted]).nunique() >= MIN_RATES).any():
        raise UserError(f"no curve has {MIN_RATES} rates near its lowest loss, as many as a parabola needs")
    shared = rows.regression(fitted)
    if not shared.determined:
        which = ", ".join(columns)
        raise UserError(f"these runs do not determine the exponents of {which}: leave out a column that hardly varies")
    if not shared.k > 0:
        raise UserError("the losses do not rise on both sides of a best rate: try lower and higher rates")
    # The exponent of a variable that only one method varies, such as the batch, stays shared.
    each = [fitted & (of_method == i) for i in range(len(names))]
    varies = [all(len(np.unique(z[rows_of, j])) > 1 for rows_of in each) for j in range(z.shape[1])]
    apart = replace(
        rows, places=np.hstack([one, *(one * z[:, [j]] if own else z[:, [j]] for j, own in enumerate(varies))])
    )
    own = apart.regression(fitted)
    if len(names) == 1 or not any(varies) or not own.determined or not own.k > 0:
        own = None
    equal = f_test(shared, own) if own else None
    law, rows = (own, apart) if own and equal and equal["p"] < EQUAL_UNLESS else (shared, rows)
    warnings = [f"{(~rows.near).sum()} runs beyond {reach:g} times a curve's best rate left out"]
    warnings = warnings * (not rows.near.all())
    several = by_curve["x"].transform("nunique") >= MIN_RATES
    at_end = (x == by_curve["x"].transform("min")) | (x == by_curve["x"].transform("max"))
    if edges := ", ".join(curves[fitted & (np.arange(len(x)) == lowest) & several & at_end]):
        warnings.append(f"the lowest loss is at the edge of the rates tried: {edges}")
    models = _names(*(table[column] for column in columns)) if columns else np.full(len(x), "")
    split = [held] if held.any() else [models == model for model in np.unique(models)]
    held_out = tuple(one for out in split for one in rows.predicted(out))
    if not held_out:
        warnings.append("no held-out error: the other curves do not determine the law")
    laws, intervals = _laws(shared, names, reference, [False] * len(varies))
    own_laws, own_intervals = _laws(own, names, reference, varies) if own else (None, None)
    chosen = own_intervals if own_intervals and law is own else intervals
    loose = [f"{key} of {name}" for name, ci in chosen.items() for key in unbounded(ci)]
    if loose:
        warnings.append(f"the runs do not bound {', '.join(loose)}: their intervals are infinite")
    return RateFit(
        n=int(fitted.sum()), n_curves=len(np.unique(curves[fitted])), laws=laws, ci=intervals,
        own=own_laws, own_ci=own_intervals, equal_exponents=equal, exponents="shared" if law is shared else "own",
        curvature=law.k, curvature_se=law.k_se, scatter=law.scatter, df=law.df,
        fitted={name: (float(each[fitted].min()), float(each[fitted].max())) for name, each in told.items()},
        curves=rows.optima(~held, law), hold_out_given=bool(held.any()),
        held_out=held_out, warnings=tuple(warnings),
    )  # fmt: skip


def unbounded(ci: Mapping[str, tuple[float | None, float | None]]) -> list[str]:
    """The coefficients whose interval is infinite; in JSON such an end is None."""
    return [key for key, ends in ci.items() if any(end is None or math.isinf(end) for end in ends)]


def within_reach(x: Array, x_of_lowest: Array | float, reach: float = REACH) -> Array:
    """Whether rates are fitted, given ln rate (n,) of the runs and of the lowest loss on their curves; see `REACH`."""
    return np.abs(x - x_of_lowest) <= math.log(reach)


def _names(*columns: pd.Series) -> Array:
    """The values of each row as one string."""
    words = [column.map(lambda value: f"{value:g}" if isinstance(value, float) else str(value)) for column in columns]
    return np.array([" ".join(row) for row in zip(*words, strict=True)])


def _laws(
    fit: ParabolaRegression, names: Array, reference: Mapping[str, float], of_each: Sequence[bool]
) -> tuple[dict[str, RateLaw], dict[str, dict[str, tuple[float, float]]]]:
    """The law of each method, and the intervals of its coefficients; `of_each`: which exponents are not shared."""
    laws, intervals = {}, {}
    widths = [len(names) if own else 1 for own in of_each]
    first = [len(names) + sum(widths[:j]) for j in range(len(widths))]
    for i, name in enumerate(names):
        log_m, ends = fit.ratio(i)
        columns = zip(reference, first, of_each, strict=True)
        exponents = {EXPONENTS[variable]: fit.ratio(start + i * own) for variable, start, own in columns}
        at = {f"{variable}_0": value for variable, value in reference.items()}
        laws[name] = RateLaw(m=math.exp(log_m), **{key: value for key, (value, _) in exponents.items()}, **at)
        intervals[name] = {"m": (float(np.exp(ends[0])), float(np.exp(ends[1])))}
        intervals[name] |= {key: ci for key, (_, ci) in exponents.items()}
    return laws, intervals


def fit_brackets(factor: Array, loss: Array, bracket: Sequence[str], seed: Sequence[int]) -> dict[str, Any]:
    """The possible cost of rates that are not the best: fit runs (runs,) of models trained at multiples of their rate.

    A bracket is the losses of one model at its usual rate (factor 1) and at other factors, such as 0.5 and 2. It is a
    parabola in the logarithm of the factor:

        loss = lowest + k (ln factor - ln best)^2 = level + k (ln factor)^2 - 2 (k ln best) ln factor

    All brackets share the curvature k; each has its own best factor, and each of its seeds its own level, the loss at
    factor 1. The gain of the best rate over the usual one is k (ln best)^2.

    Args:
        factor: each run's rate divided by the usual rate.
        loss: nats per token.
        bracket: name of each run's bracket. A bracket needs only two factors if another one has three.
        seed: seed of each run.

    Returns:
        `curvature` k, in nats per (ln rate)^2, and `curvature_se`; `scatter` of the losses around the parabolas, in
        nats; `df`, degrees of freedom of the scatter and of every error; and for `each` bracket its `best` factor, the
        `lowest` loss (at that factor, averaged over seeds), the `gain` (fitted loss at factor 1 minus the lowest) and
        its standard error `se`, to second order in ln best, so that it is not zero where the usual rate is the best.
        NaN if the brackets do not determine a parabola that opens upwards, and for errors without degrees of freedom.
    """
    x, (of, names) = np.log(factor), pd.factorize(np.array(bracket))
    curves = pd.Series(bracket).str.cat(pd.Series(seed).astype(str), " ")
    fit = ParabolaRegression.of(x, loss, curves.to_numpy(), np.eye(len(names))[of])
    k = fit.k if fit.determined and fit.k > 0 else math.nan
    at_usual = loss - k * x**2 + 2 * x * fit.products[of]  # each run's loss, shifted along the parabola to factor 1
    each = []
    for i in range(len(names)):
        log_best = float(fit.products[i] / k)
        gradient = np.zeros(1 + len(names))  # of the gain, (k ln best)^2 / k
        gradient[0], gradient[1 + i] = -(log_best**2), 2 * log_best
        level = float(pd.Series(at_usual[of == i]).groupby(curves[of == i].to_numpy()).mean().mean())
        gain, variance = k * log_best**2, float(gradient @ fit.covariance @ gradient)
        of_best = np.array([-log_best, *np.eye(len(names))[i]]) / k  # gradient of ln best
        variance += 2 * (k * float(of_best @ fit.covariance @ of_best)) ** 2
        se = math.sqrt(max(variance, 0.0)) if math.isfinite(variance) else math.nan
        each.append({"best": float(np.exp(log_best)), "lowest": level - gain, "gain": gain, "se": se})
    curvature, error = (fit.k, fit.k_se) if fit.determined else (math.nan, math.nan)
    return {"curvature": curvature, "curvature_se": error, "scatter": fit.scatter, "df": fit.df, "each": each}
