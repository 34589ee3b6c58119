"""Approach 2 (Hoffmann et al. 2022, section 3.2): one parabola per compute budget, and a power law through the optima.

Within a budget C the loss is fitted by least squares as c0 + c1 z + c2 z^2, z = log10 x, where x is a model size,
a token count or FLOPs per token. The optima x* then give x*(C) = coefficient * C^exponent by least squares in log10.

A parabola is only the first terms of a series: its minimum is biased even without noise, unless the loss is symmetric
in log x. The bias grows as the grid gets wider or more off-centre. Compare it with a fit of the whole surface, or fit
it only to sizes near the optimum.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from peerscale.laws.fitting import (
    Bootstrap,
    Fit,
    HoldOut,
    cluster_labels,
    miss,
    percentile_interval,
    positive_columns,
    resample_residuals,
    table_warnings,
)
from peerscale.laws.parametric import fit_parametric
from peerscale.laws.solver import Array, FitStatus, Number
from peerscale.stats.optima import OptimaFit, OptimumStatus, optimum_status, parabola_optima

MIN_BUDGETS = 3
"""Different optima needed for a power law: one more than its coefficients."""
MIN_SIZES = 5
"""Sizes needed for a parabola: two more than its coefficients; with fewer than three there is no parabola at all."""
MAX_SPAN = 20.0
"""Ratio of the largest to the smallest x of a budget above which the bias of the parabola causes a warning: +-4x."""


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """x*(C) = coefficient * C^exponent; both are None if there are too few optima."""

    exponent: Number | None
    """d log x* / d log C."""
    coefficient: Number | None
    """x* at C = 1 FLOP."""

    def optimum(self, budget: ArrayLike) -> Number:
        """Compute-optimal x at `budget` FLOPs; NaN without a power law."""
        if self.exponent is None or self.coefficient is None:
            return np.full_like(np.asarray(budget, float), np.nan)
        return self.coefficient * np.asarray(budget, float) ** self.exponent


def fit_power_law(budgets: Array, optima: Array) -> tuple[Array, Array]:
    """Least squares of log10 x* (..., budgets) on log10 C; returns exponent and coefficient, (...)."""
    log_budgets, log_optima = np.log10(budgets), np.log10(optima)
    centred = log_budgets - log_budgets.mean()
    exponent = log_optima @ centred / (centred @ centred)
    with np.errstate(over="ignore", under="ignore"):
        return exponent, 10 ** (log_optima.mean(axis=-1) - exponent * log_budgets.mean())


def predict_largest(
    budgets: Array, optima: Array, refits: Iterable[tuple[Array, Array]] = (), observed: Array | None = None
) -> HoldOut | None:
    """The optimum of the largest budget, predicted by a power law through those of the others (at least two).

    Args:
        budgets, optima: (budgets,), ascending. Budgets at the end with the same optimum are held out together.
        refits: budgets and optima of each bootstrap resample.
        observed: the bootstrap's optima at the largest budget.
    """
    held = budgets > budgets[optima != optima[-1]].max(initial=0)
    start, at = float(budgets[held][0]), float(np.exp(np.log(budgets[held]).mean()))

    def prediction(budgets: Array, optima: Array) -> float:
        below = budgets < start
        if len(np.unique(optima[below])) < 2:
            return float("nan")
        exponent, coefficient = fit_power_law(budgets[below], optima[below])
        with np.errstate(over="ignore", invalid="ignore"):
            return float(coefficient * at**exponent)

    predicted = prediction(budgets, optima)
    if not np.isfinite(predicted):
        return None
    drawn = np.array([prediction(*refit) for refit in refits])
    return HoldOut.of(
        optima[-1:], np.array([predicted]), quantity="x", budget=start, n=int(held.sum()),
        interval=percentile_interval(drawn) if len(drawn) else None,
        observed_interval=None if observed is None else percentile_interval(observed),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetOptimum:
    """The optimum of one budget: the minimum of its parabola."""

    budget: float
    x: float
    """10^(-c1 / (2 c2)); NaN if the parabola does not open upwards."""
    loss: float
    """Loss there, c0 - c1^2 / (4 c2)."""
    curvature: float
    """c2, in loss per squared decade of x."""
    n: int
    """Number of fitted runs, including repeats."""
    sizes: tuple[float, ...]
    """x of the fitted runs, ascending."""
    status: OptimumStatus
    coefficients: tuple[float, float, float]
    """(c0, c1, c2) of the parabola in log10 x; NaN with fewer than three sizes."""
    x_interval: tuple[float, float] | None = None
    loss_interval: tuple[float, float] | None = None
    """Bootstrap intervals, if requested."""


@dataclass(frozen=True, kw_only=True)
class IsoflopFit(PowerLaw, Fit):
    """The optimum of each budget and the power law through the unflagged ones.

    The bootstrap's draws are `exponent` and `coefficient`, (resamples,), and the optima's `x` and `loss`,
    (resamples, budgets).
    """

    law: ClassVar[str] = "isoflop"
    form: ClassVar[type] = PowerLaw
    vertices: tuple[BudgetOptimum, ...]
    """The optimum of every budget, ascending, including flagged ones; named as in `fit.json`."""
    surface_exponent: float | None
    """The exponent by approach 3 (squared error) on the same runs, without the bias of parabolas; None if they do not
    determine it."""


def fit_isoflop(
    table: pd.DataFrame, *, budget: str, x: str, loss: str, include_flagged: bool = False,
    within: float | None = None, bootstrap: int = 0, seed: int = 0, cluster: str | None = None,
) -> IsoflopFit:  # fmt: skip
    """Fit a parabola in log x to each budget and a power law through the optima.

    Args:
        table: one row per run.
        budget, x, loss: columns; all rows of a budget must have exactly the same value.
        include_flagged: use flagged optima in the power law too, as most published fits do. Parabolas that open
            downwards are never used.
        within: leave out sizes whose loss is more than this share above the budget's lowest, see `near_lowest`; None
            fits all sizes, as in Hoffmann et al.
        bootstrap: number of resamples, 0 for none. Residuals are resampled over all budgets together, scaled for the
            three coefficients of each parabola, because a budget of five runs cannot lose a run.
        seed: seed of the resampling.
        cluster: column; rows with equal values draw from the same residuals.

    Raises:
        UserError: a column is missing or has values that are not finite numbers above zero; there are no rows.
    """
    budgets, sizes, losses = positive_columns(table, budget, x, loss, law=IsoflopFit.law, at_least=1)
    near, left_out = np.ones(len(table), bool), ()
    if within is not None:
        counts = []
        for value in np.unique(budgets):
            here = budgets == value
            near[here] = near_lowest(sizes[here], losses[here], within)
            if n_far := len(np.unique(sizes[here & ~near])):
                counts.append(f"{value:.3g} ({n_far})")
        far = f"{100 * within:.3g} % above the lowest loss"
        left_out = (f"sizes left out, more than {far}: at budget {', '.join(counts)}",) if counts else ()
        budgets, sizes, losses = budgets[near], sizes[near], losses[near]
    values, group = np.unique(budgets, return_inverse=True)
    fit = OptimaFit(  # one parabola per budget through its runs, including repeats of a size
        names=tuple(map(str, values)), method=group, x=sizes, losses=losses, n_seeds=np.ones(len(losses), int),
        seed_squares=np.zeros(len(values)), seed_df=np.zeros(len(values)), shared=False, at_least=MIN_SIZES,
    )  # fmt: skip
    found = [_optimum(fit, i, float(value)) for i, value in enumerate(values)]
    has_parabola = np.array([np.isfinite(one.curvature) for one in found])
    optima = np.array([one.x for one in found])
    usable = np.array([one.status is OptimumStatus.OK for one in found]) | (include_flagged & np.isfinite(optima))
    draws = drawn = None
    if bootstrap:
        n_runs = np.bincount(group)[group]
        spare = np.where(has_parabola[group] & (n_runs > 3), n_runs - 3, np.nan)  # degrees of freedom
        scaled = fit.residuals * np.sqrt(n_runs / spare)
        clusters = cluster_labels(table[near], cluster) if cluster else None
        resampled = losses - fit.residuals + resample_residuals(scaled, bootstrap, seed, clusters)
        refitted = np.where(has_parabola, fit.optima_of(resampled), np.nan)
        draws, drawn = _bootstrap(values, refitted, optima, usable, seed)
        found = [
            replace(one, x_interval=percentile_interval(x), loss_interval=percentile_interval(lowest))
            for one, x, lowest in zip(found, draws.draws["x"].T, draws.draws["loss"].T, strict=True)
        ]
    exponent = coefficient = hold_out = surface = None
    if usable.sum() >= MIN_BUDGETS:
        exponent, coefficient = map(float, fit_power_law(values[usable], optima[usable]))
        observed = draws.draws["x"][:, np.flatnonzero(usable)[-1]] if draws else None
        refits = () if drawn is None else ((values[usable], x) for x in drawn)
        hold_out = predict_largest(values[usable], optima[usable], refits, observed)
    if len(losses) > 5 and len(values) > 1:  # L = E + A / x^alpha + B / (C / x)^beta, for any measure x of size
        runs = pd.DataFrame({"x": sizes, "rest": budgets / sizes, "loss": losses})
        fit_of_all = fit_parametric(runs, params="x", tokens="rest", loss="loss", objective="mse")
        surface = float(fit_of_all.a) if fit_of_all.status is FitStatus.CONVERGED else None
    warnings = (*left_out, *_warnings(found, usable.sum()), *table_warnings(table, budget, x, loss))
    return IsoflopFit(
        n=len(losses), status=FitStatus.TOO_FEW_POINTS if exponent is None else FitStatus.CONVERGED,
        objective_name="mse", objective_value=float(np.sum(fit.residuals[has_parabola[group]] ** 2)),
        vertices=tuple(found),
        surface_exponent=surface, exponent=exponent, coefficient=coefficient,
        warnings=(*warnings, *miss(hold_out)), hold_out=hold_out, bootstrap=draws,
    )  # fmt: skip


def near_lowest(sizes: Array, losses: Array, within: float) -> Array:
    """Which runs (runs,) of one budget lie near its minimum, where a parabola can hold.

    These are the sizes whose mean loss is at most a share `within` above the lowest, all sizes between them, and always
    the five sizes with the lowest losses. Losses decide rather than distances in x, since the loss may rise much more
    on one side of the minimum: a large model at a small budget has hardly begun to learn.
    """
    found, size = np.unique(sizes, return_inverse=True)
    means = np.bincount(size, losses) / np.bincount(size)
    limit = max(means.min() * (1 + within), np.sort(means)[:MIN_SIZES][-1])
    near = found[means <= limit]
    return (near[0] <= sizes) & (sizes <= near[-1])


def _optimum(fit: OptimaFit, i: int, budget: float) -> BudgetOptimum:
    """The minimum of the parabola of one budget, which is method `i` of the fit; NaN if it has none."""
    runs = fit.x[fit.method == i]
    sizes = np.unique(runs)
    coefficients = fit.coefficients(fit.names[i]) if len(sizes) >= 3 else (math.nan,) * 3
    x, loss = map(float, parabola_optima(np.array(coefficients)))
    curvature = coefficients[2] if math.isfinite(x) else math.nan
    return BudgetOptimum(
        budget=budget, x=x, loss=loss, curvature=coefficients[2], n=len(runs), sizes=tuple(sizes.tolist()),
        status=optimum_status(np.log10(x), np.log10(sizes), curvature, MIN_SIZES), coefficients=coefficients,
    )  # fmt: skip


def _bootstrap(budgets: Array, refitted: Array, optima: Array, usable: Array, seed: int) -> tuple[Bootstrap, Array]:
    """The bootstrap of refitted x and loss (2, resamples, budgets), and the optima used in its power laws.

    Optima may scatter around the power law more than the scatter of the runs explains. Noise with the excess variance,
    estimated by moments (DerSimonian and Laird 1986; here relative to the median optimum's variance), is added before a
    power law is fitted. A resample fails if a parabola used in the power law opens downwards.
    """
    x, loss = refitted
    draws = {}
    good = np.isfinite(x).any(axis=1)
    scattered = np.empty((len(x), 0))
    if usable.sum() >= MIN_BUDGETS:
        good = np.isfinite(x[:, usable]).all(axis=1)
        exponent, coefficient = fit_power_law(budgets[usable], optima[usable])
        misses = np.log10(optima[usable] / (coefficient * budgets[usable] ** exponent))
        explained = float(np.median(np.var(np.log10(x[good][:, usable]), axis=0))) if good.any() else 0.0
        excess = max(0.0, float(misses @ misses) / (len(misses) - 2) - explained)
        scattered = x[:, usable] * 10 ** np.random.default_rng(seed).normal(0, np.sqrt(excess), (len(x), len(misses)))
        draws["exponent"], draws["coefficient"] = fit_power_law(budgets[usable], scattered)
    draws = {name: values[good] for name, values in {**draws, "x": x, "loss": loss}.items()}
    return Bootstrap(draws=draws, resamples=len(x), failed=int(np.sum(~good)), seed=seed), scattered[good]


def _warnings(optima: list[BudgetOptimum], n_usable: int) -> tuple[str, ...]:
    found = []
    for status in OptimumStatus:
        flagged = [f"{one.budget:.3g}" for one in optima if one.status is status]
        if flagged and status is not OptimumStatus.OK:
            found.append(f"{status}: the minimum at budget {', '.join(flagged)} is flagged")
    spans = {one.budget: one.sizes[-1] / one.sizes[0] for one in optima}
    wide = [f"{budget:.3g} ({span:.0f}x)" for budget, span in spans.items() if span > MAX_SPAN]
    if wide:
        found.append(f"wide grid at budget {', '.join(wide)}: a parabola is biased beyond about +-4x of the optimum")
    if n_usable < MIN_BUDGETS:
        found.append(f"no exponent: {n_usable} usable budgets, a power law wants {MIN_BUDGETS}")
    return tuple(found)
