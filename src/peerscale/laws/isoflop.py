"""Approach 2 (Hoffmann et al. 2022, section 3.2): one parabola per compute budget, and a power law through the optima.

Within a budget C the loss is fitted by least squares as c0 + c1 z + c2 z^2, z = log10 x, where x is a model size,
a token count or FLOPs per token. The optima x* then give x*(C) = coefficient * C^exponent by least squares in log10.

A parabola is only the first terms of a series: its minimum is biased even without noise, unless the loss is symmetric
in log x. The bias grows as the grid gets wider or more off-centre. Compare it with a fit of the whole surface, or fit
it only to sizes near the optimum.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from peerscale.laws.bootstrap import Bootstrap, percentile_interval, resample_residuals
from peerscale.laws.fitting import Fit, HoldOut, Number
from peerscale.laws.least_squares import FitStatus
from peerscale.laws.linear_fit import Array, LinearFit
from peerscale.laws.parabola import OptimumStatus, minimum, parabola_optima, recentred
from peerscale.laws.parametric import fit_parametric
from peerscale.laws.table import cluster_labels, positive_columns, table_warnings

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
    log_budgets = np.log10(budgets)
    centre = log_budgets.mean()
    design = np.stack([np.ones_like(log_budgets), log_budgets - centre], axis=1)
    level, exponent = np.moveaxis(LinearFit(design=design, values=log_budgets).coefficients_of(np.log10(optima)), -1, 0)
    with np.errstate(over="ignore", under="ignore"):
        return exponent, 10 ** (level - exponent * centre)


def predict_largest(budgets: Array, optima: Array, drawn: Array | None, observed: Array | None) -> HoldOut | None:
    """The optimum of the largest budget, predicted by a power law through those of the others.

    Args:
        budgets, optima: (budgets,), ascending.
        drawn: optima in each bootstrap resample, (resamples, budgets).
        observed: the bootstrap's optima at the largest budget, (resamples,), without their scatter about the law.
    """
    smaller = optima[None, :-1] if drawn is None else np.vstack([optima, drawn])[:, :-1]
    exponent, coefficient = fit_power_law(budgets[:-1], smaller)
    with np.errstate(over="ignore", invalid="ignore"):
        predicted = coefficient * budgets[-1] ** exponent
    if not np.isfinite(predicted[0]):
        return None
    return HoldOut.of(
        optima[-1:], predicted[:1], quantity="x", budget=float(budgets[-1]), n=1,
        interval=None if drawn is None else percentile_interval(predicted[1:]),
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
    values, group = np.unique(budgets, return_inverse=True)
    near = np.ones(len(table), bool)
    if within is not None:
        for i in range(len(values)):
            near[group == i] = near_lowest(sizes[group == i], losses[group == i], within)
    left_out = _left_out(budgets[~near], sizes[~near], within)
    budgets, sizes, losses, group = budgets[near], sizes[near], losses[near], group[near]
    z, one = np.log10(sizes), (group[:, None] == np.arange(len(values))).astype(float)
    centre = float(z.mean())
    z = (z - centre)[:, None]
    linear = LinearFit(design=np.hstack([one, one * z, one * z**2]), values=losses)  # one parabola per budget
    fitted_sizes = [np.unique(sizes[group == i]) for i in range(len(values))]
    fits = np.array([len(each) >= 3 for each in fitted_sizes])  # a parabola through all runs, with repeats of a size

    def parabolas(coefficients: Array) -> Array:
        """From coefficients (..., 3 budgets) to (3, ..., budgets), NaN for budgets without a parabola."""
        each = np.moveaxis(coefficients.reshape(*coefficients.shape[:-1], 3, -1), -2, 0)
        return np.where(fits, each, np.nan)

    curves, residuals = parabolas(linear.coefficients), np.where(fits[group], linear.residuals, np.nan)
    counts = np.bincount(group)
    found = [
        _optimum(budget, n, each, curve, centre)
        for budget, n, each, curve in zip(values.tolist(), counts.tolist(), fitted_sizes, curves.T, strict=True)
    ]
    optima = np.array([one.x for one in found])
    usable = np.array([one.status is OptimumStatus.OK for one in found]) | (include_flagged & np.isfinite(optima))
    draws = drawn = None
    if bootstrap:
        scale = np.sqrt(counts / np.where(counts > 3, counts - 3, np.nan))  # for the degrees of freedom
        resampled = resample_residuals(residuals * scale[group], bootstrap, seed, cluster_labels(table[near], cluster))
        refitted = parabolas(linear.coefficients_of(losses - np.nan_to_num(residuals) + resampled))
        draws, drawn = _bootstrap(values, np.stack(parabola_optima(refitted, centre)), optima, usable, seed)
        found = [
            replace(one, x_interval=percentile_interval(x), loss_interval=percentile_interval(lowest))
            for one, x, lowest in zip(found, draws.draws["x"].T, draws.draws["loss"].T, strict=True)
        ]
    exponent = coefficient = hold_out = surface = None
    if usable.sum() >= MIN_BUDGETS:
        exponent, coefficient = map(float, fit_power_law(values[usable], optima[usable]))
        observed = draws.draws["x"][:, np.flatnonzero(usable)[-1]] if draws else None
        hold_out = predict_largest(values[usable], optima[usable], drawn, observed)
    if len(losses) > 5 and len(values) > 1:  # L = E + A / x^alpha + B / (C / x)^beta, for any measure x of size
        runs = pd.DataFrame({"x": sizes, "rest": budgets / sizes, "loss": losses})
        fit_of_all = fit_parametric(runs, params="x", tokens="rest", loss="loss", objective="mse")
        surface = float(fit_of_all.a) if fit_of_all.status is FitStatus.CONVERGED else None
    warnings = (*left_out, *_warnings(found, usable.sum()), *table_warnings(table, budget, x, loss))
    return IsoflopFit(
        n=len(losses), status=FitStatus.TOO_FEW_POINTS if exponent is None else FitStatus.CONVERGED,
        objective_name="mse", objective_value=float(np.nansum(residuals**2)), vertices=tuple(found),
        surface_exponent=surface, exponent=exponent, coefficient=coefficient,
        warnings=(*warnings, *(hold_out.warnings if hold_out else ())), hold_out=hold_out, bootstrap=draws,
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


def _optimum(budget: float, n: int, sizes: Array, curve: Array, centre: float) -> BudgetOptimum:
    """The minimum of the parabola `curve` (3,) in log10 x - centre through `n` runs of a budget; NaN without one."""
    x, loss = map(float, parabola_optima(curve, centre))
    _, status = minimum(curve if math.isfinite(x) else np.full(3, math.nan), np.log10(sizes) - centre, MIN_SIZES)
    return BudgetOptimum(
        budget=budget, x=x, loss=loss, curvature=float(curve[2]), n=n, sizes=tuple(sizes.tolist()), status=status,
        coefficients=recentred(curve, centre),
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


def _left_out(budgets: Array, sizes: Array, within: float | None) -> tuple[str, ...]:
    """A warning that says how many sizes of each budget are not fitted, from the runs that are not."""
    counts = [f"{budget:.3g} ({len(np.unique(sizes[budgets == budget]))})" for budget in np.unique(budgets)]
    if within is None or not counts:
        return ()
    return (f"sizes left out, more than {100 * within:.3g} % above the lowest loss: at budget {', '.join(counts)}",)


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
