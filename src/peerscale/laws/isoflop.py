"""Approach 2 (Hoffmann et al. 2022, section 3.2): a parabola per compute budget, a power law through the minima.

Within one budget C the loss is fitted by least squares as c0 + c1 z + c2 z^2, z = log10 x, where x is a model size,
a token count or FLOPs per token. The minima x* then give x*(C) = coefficient * C^exponent by least squares in log10.

A parabola is only the start of a series: its minimum is biased even without noise, unless the loss is symmetric in
log x, and the more so the wider or the more off-centre the grid. Read it beside a fit of the whole surface, or let it
go through the sizes near the minimum only.
"""

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import ClassVar

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from peerscale.laws.bootstrap import Bootstrap, percentile_interval, resample_residuals
from peerscale.laws.fit import Fit
from peerscale.laws.parametric import fit_parametric
from peerscale.laws.power_law import MIN_BUDGETS, PowerLaw, fit_power_law, predict_largest
from peerscale.laws.results import Array, FitStatus, Number
from peerscale.laws.table import positive_columns, row_labels, table_warnings

MIN_SIZES = 5
"""Sizes wanted for a parabola: two more than its coefficients."""
MAX_OFF_CENTRE = 0.3
"""How far from the middle of the sampled log range, as a share of it, a minimum may lie."""
MAX_SPAN = 20.0
"""Largest over smallest x of a budget beyond which the parabola's bias is worth a warning: about +-4x."""


class VertexStatus(StrEnum):
    """Whether a budget's minimum can be trusted; anything but `ok` is a flag."""

    OK = "ok"
    TOO_FEW = "too_few"
    """Fewer than five different sizes; below three there is no parabola at all."""
    CURVATURE = "curvature"
    """The parabola is flat or opens downwards: its vertex is no minimum."""
    OUTSIDE_RANGE = "outside_range"
    """The minimum lies beyond the sampled sizes: an extrapolation."""
    OFF_CENTRE = "off_centre"
    """The minimum lies in the outermost fifth of the sampled range."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Vertex:
    """The fitted minimum of one budget."""

    budget: float
    x: float
    """Minimiser 10^(-c1 / (2 c2)); NaN where no parabola opens upwards."""
    loss: float
    """Loss there, c0 - c1^2 / (4 c2)."""
    curvature: float
    """c2, in loss per squared decade of x."""
    n: int
    """Runs that the parabola is fitted to, repeats included."""
    sizes: tuple[float, ...]
    """Their x, ascending."""
    status: VertexStatus
    coefficients: tuple[float, float, float]
    """(c0, c1, c2) of the parabola in log10 x; NaN below three sizes."""
    x_interval: tuple[float, float] | None = None
    loss_interval: tuple[float, float] | None = None
    """Bootstrap intervals of the minimum, if asked for."""

    @property
    def is_minimum(self) -> bool:
        """Whether there is a parabola that opens upwards, flagged or not."""
        return math.isfinite(self.x)

    def predict(self, x: ArrayLike) -> Number:
        """Loss of the fitted parabola at `x`, in raw units."""
        return np.polynomial.polynomial.polyval(np.log10(x), self.coefficients)


@dataclass(frozen=True, kw_only=True)
class IsoflopFit(PowerLaw, Fit):
    """Minima per budget and the power law through the unflagged ones.

    The bootstrap's draws are `exponent` and `coefficient`, (resamples,), and the minima's `x` and `loss`,
    (resamples, budgets).
    """

    law: ClassVar[str] = "isoflop"
    form: ClassVar[type] = PowerLaw
    vertices: tuple[Vertex, ...]
    """One per budget, ascending; flagged ones are here too."""
    surface_exponent: float | None
    """The exponent by approach 3, squared error, on the same runs, which no parabola biases; None below six runs."""


def fit_isoflop(
    table: pd.DataFrame,
    *,
    budget: str,
    x: str,
    loss: str,
    include_flagged: bool = False,
    within: float | None = None,
    bootstrap: int = 0,
    seed: int = 0,
    cluster: str | None = None,
) -> IsoflopFit:
    """Fit a parabola in log x to each budget and a power law through the minima.

    Args:
        table: one row per run.
        budget, x, loss: columns; rows of one budget hold exactly the same value.
        include_flagged: let the power law use flagged minima too, as most published fits do. Vertices of parabolas
            that open downwards are never used.
        within: leave out sizes whose loss is more than this share above the budget's lowest, see `near_lowest`; None,
            as in Hoffmann et al., fits all.
        bootstrap: number of resamples, 0 for none. Residuals are resampled over all budgets together, scaled for the
            three coefficients of each parabola, because a budget of five runs cannot lose one.
        seed: of the resampling.
        cluster: column whose equal values draw from the same residuals.

    Raises:
        UserError: a column is missing or holds anything but finite numbers above zero; no rows.
    """
    budgets, sizes, losses = positive_columns(table, budget, x, loss, law=IsoflopFit.law, at_least=1)
    near, left_out = np.ones(len(table), bool), ()
    if within is not None:
        for value in np.unique(budgets):
            here = budgets == value
            near[here] = near_lowest(sizes[here], losses[here], within)
        left_out = _left_out(budgets[~near], sizes[~near], within)
        budgets, sizes, losses = budgets[near], sizes[near], losses[near]
    values, group = np.unique(budgets, return_inverse=True)
    rows_of = [np.flatnonzero(group == i) for i in range(len(values))]
    vertices = [_vertex(float(c), sizes[rows], losses[rows]) for c, rows in zip(values, rows_of, strict=True)]
    fitted = np.empty(len(losses))
    for vertex, rows in zip(vertices, rows_of, strict=True):
        fitted[rows] = vertex.predict(sizes[rows])
    usable = np.array([v.status is VertexStatus.OK or (include_flagged and v.is_minimum) for v in vertices])
    optima = np.array([vertex.x for vertex in vertices])
    draws = drawn = None
    if bootstrap:
        freedom = np.bincount(group)[group] - 3.0  # runs beyond the parabola's three coefficients
        scaled = (losses - fitted) * np.sqrt((freedom + 3) / np.where(freedom > 0, freedom, np.nan))
        clusters = row_labels(table, cluster)[near] if cluster else None
        resampled = fitted + resample_residuals(scaled, bootstrap, seed, clusters)
        draws, drawn = _bootstrap(values, rows_of, sizes, resampled, optima, usable, seed)
        vertices = [
            replace(vertex, x_interval=percentile_interval(xs), loss_interval=percentile_interval(minimal))
            for vertex, xs, minimal in zip(vertices, draws.draws["x"].T, draws.draws["loss"].T, strict=True)
        ]
    exponent = coefficient = hold_out = surface = None
    if usable.sum() >= MIN_BUDGETS:
        exponent, coefficient = map(float, fit_power_law(values[usable], optima[usable]))
        observed = draws.draws["x"][:, np.flatnonzero(usable)[-1]] if draws else None
        refits = () if drawn is None else ((values[usable], x) for x in drawn)
        hold_out = predict_largest(values[usable], optima[usable], refits, observed)
    if len(losses) > 5 and len(values) > 1:  # L = E + A / x^alpha + B / (C / x)^beta, whatever x is
        runs = pd.DataFrame({"x": sizes, "rest": budgets / sizes, "loss": losses})
        surface = fit_parametric(runs, params="x", tokens="rest", loss="loss", objective="mse")
    return IsoflopFit(
        n=len(losses),
        status=FitStatus.TOO_FEW_POINTS if exponent is None else FitStatus.CONVERGED,
        objective_name="mse",
        objective_value=float(np.nansum((losses - fitted) ** 2)),
        vertices=tuple(vertices),
        surface_exponent=None if surface is None else float(surface.a),
        exponent=exponent,
        coefficient=coefficient,
        warnings=(
            *left_out,
            *_warnings(vertices, [float(sizes[rows].max() / sizes[rows].min()) for rows in rows_of], usable.sum()),
            *table_warnings(table, budget, x, loss),
            *(hold_out.warnings() if hold_out else ()),
        ),
        hold_out=hold_out,
        bootstrap=draws,
    )


def near_lowest(sizes: Array, losses: Array, within: float) -> Array:
    """Which runs (runs,) of one budget lie near its minimum, where a parabola can hold.

    Those of the sizes, and of all between them, whose mean loss is at most `within` of the lowest above it; of the five
    sizes with the lowest losses in any case. Losses decide, not distances in x, as a grid that reaches as far to both
    sides may climb one side much higher: a large model at a small budget has hardly begun to learn.
    """
    found, size = np.unique(sizes, return_inverse=True)
    means = np.bincount(size, losses) / np.bincount(size)
    limit = max(means.min() * (1 + within), np.sort(means)[:MIN_SIZES][-1])
    near = found[means <= limit]
    return (near[0] <= sizes) & (sizes <= near[-1])


def fit_parabolas(x: Array, losses: Array) -> Array:
    """Least squares of losses (..., runs) by c0 + c1 z + c2 z^2, z = log10 x (runs,), of three or more sizes.

    Returns:
        c0, c1, c2: (3, ...).
    """
    z = np.log10(x)
    centre = float(z.mean())  # z^2 of uncentred sizes is almost collinear with z
    c0, c1, c2 = np.linalg.pinv(np.vander(z - centre, 3, increasing=True)) @ losses.T
    return np.stack([c0 - c1 * centre + c2 * centre**2, c1 - 2 * c2 * centre, c2])


def minima(coefficients: Array) -> tuple[Array, Array]:
    """x and loss where parabolas of `coefficients` (3, ...) are lowest; NaN where they open downwards."""
    c0, c1, c2 = coefficients
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        x, loss = 10.0 ** (-c1 / (2 * c2)), c0 - c1**2 / (4 * c2)
    there = (c2 > 0) & np.isfinite(x) & (x > 0)
    return np.where(there, x, np.nan), np.where(there, loss, np.nan)


def _vertex(budget: float, sizes: Array, losses: Array) -> Vertex:
    coefficients, status, n_sizes = np.full(3, np.nan), VertexStatus.TOO_FEW, len(np.unique(sizes))
    if n_sizes >= 3:
        coefficients = fit_parabolas(sizes, losses)
    x, loss = map(float, minima(coefficients))
    if n_sizes >= MIN_SIZES:
        low, high = np.log10(sizes.min()), np.log10(sizes.max())
        off_centre = abs(np.log10(x) - (low + high) / 2) / (high - low)
        if not math.isfinite(x):
            status = VertexStatus.CURVATURE
        elif off_centre > 0.5:
            status = VertexStatus.OUTSIDE_RANGE
        else:
            status = VertexStatus.OFF_CENTRE if off_centre > MAX_OFF_CENTRE else VertexStatus.OK
    c0, c1, c2 = map(float, coefficients)
    return Vertex(
        budget=budget, x=x, loss=loss, curvature=c2, n=len(sizes), sizes=tuple(np.unique(sizes).tolist()),
        status=status, coefficients=(c0, c1, c2),
    )  # fmt: skip


def _bootstrap(
    budgets: Array, rows_of: list[Array], sizes: Array, losses: Array, optima: Array, usable: Array, seed: int
) -> tuple[Bootstrap, Array]:
    """Refits to resampled losses (resamples, runs), and the minima that their power laws go through.

    Minima may scatter about the power law by more than the runs' scatter explains. Noise of the excess variance, by
    moments (DerSimonian and Laird 1986; here over the median minimum's), is added before a power law goes through.
    A resample fails where a parabola of the power law opens downwards.
    """
    x = np.full((len(losses), len(budgets)), np.nan)
    loss = x.copy()
    for i, rows in enumerate(rows_of):
        if len(np.unique(sizes[rows])) >= 3:
            x[:, i], loss[:, i] = minima(fit_parabolas(sizes[rows], losses[:, rows]))
    draws = {"x": x, "loss": loss}
    good = np.isfinite(x).any(axis=1)
    scattered = np.empty((len(losses), 0))
    if usable.sum() >= MIN_BUDGETS:
        good = np.isfinite(x[:, usable]).all(axis=1)
        exponent, coefficient = fit_power_law(budgets[usable], optima[usable])
        misses = np.log10(optima[usable] / (coefficient * budgets[usable] ** exponent))
        explained = float(np.median(np.var(np.log10(x[good][:, usable]), axis=0))) if good.any() else 0.0
        excess = max(0.0, float(misses @ misses) / (len(misses) - 2) - explained)
        noise = np.random.default_rng(seed).normal(0, np.sqrt(excess), (len(losses), len(misses)))
        scattered = x[:, usable] * 10**noise
        draws["exponent"], draws["coefficient"] = fit_power_law(budgets[usable], scattered)
    draws = {name: values[good] for name, values in draws.items()}
    return Bootstrap(draws=draws, resamples=len(losses), failed=int(np.sum(~good)), seed=seed), scattered[good]


def _left_out(budgets: Array, sizes: Array, within: float) -> tuple[str, ...]:
    """A warning that counts the sizes left out (runs,) at each budget."""
    counts = [f"{value:.3g} ({len(np.unique(sizes[budgets == value]))})" for value in np.unique(budgets)]
    far = f"{100 * within:.3g} % above the lowest loss"
    return (f"sizes left out, more than {far}: at budget {', '.join(counts)}",) if counts else ()


def _warnings(vertices: list[Vertex], spans: list[float], n_usable: int) -> tuple[str, ...]:
    found = []
    for status in VertexStatus:
        flagged = [f"{vertex.budget:.3g}" for vertex in vertices if vertex.status is status]
        if flagged and status is not VertexStatus.OK:
            found.append(f"{status}: the minimum at budget {', '.join(flagged)} is flagged")
    wide = [f"{v.budget:.3g} ({span:.0f}x)" for v, span in zip(vertices, spans, strict=True) if span > MAX_SPAN]
    if wide:
        found.append(f"wide grid at budget {', '.join(wide)}: a parabola is biased beyond about +-4x of the optimum")
    if n_usable < MIN_BUDGETS:
        found.append(f"no exponent: {n_usable} usable budgets, a power law wants {MIN_BUDGETS}")
    return tuple(found)
