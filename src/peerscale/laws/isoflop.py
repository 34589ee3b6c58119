"""Approach 2 (Hoffmann et al. 2022, section 3.2): a parabola per compute budget, a power law through the minima.

Within one budget C the loss is fitted by least squares as c0 + c1 z + c2 z^2, z = log10 x, where x is a model size,
a token count or FLOPs per token. The minima x* then give x*(C) = coefficient * C^exponent by least squares in log10.

A parabola is only the start of a series: its minimum is biased even without noise, unless the loss is symmetric in
log x, and the more so the wider or the more off-centre the grid. Read it beside a fit of the whole surface.
"""

import math
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Literal

import numpy as np
import pandas as pd

from peerscale.laws.bootstrap import Bootstrap, resample_residuals
from peerscale.laws.results import (
    Array,
    FitStatus,
    cluster_labels,
    duplicate_warnings,
    positive_columns,
    record,
    to_plain,
)

MIN_SIZES = 5
"""Sizes wanted for a parabola: two more than its coefficients."""
MIN_BUDGETS = 3
"""Minima wanted for a power law: one more than its coefficients."""
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
    """Runs of this budget, repeats included."""
    status: VertexStatus
    coefficients: tuple[float, float, float]
    """(c0, c1, c2) of the parabola in log10 x."""

    x_interval: tuple[float, float] | None = None
    loss_interval: tuple[float, float] | None = None
    """Bootstrap intervals of the minimum, once asked for."""

    @property
    def is_minimum(self) -> bool:
        """Whether there is a parabola that opens upwards, flagged or not."""
        return math.isfinite(self.x)

    def predict(self, x: float | Array) -> Array:
        """Loss of the fitted parabola at `x` (raw units, any shape)."""
        return np.polynomial.polynomial.polyval(np.log10(x), self.coefficients)


@dataclass(frozen=True, kw_only=True, slots=True)
class IsoflopFit:
    """Minima per budget and the power law x*(C) = coefficient * C^exponent through the unflagged ones."""

    law: Literal["isoflop"] = "isoflop"
    n: int
    status: FitStatus
    objective_name: Literal["sum of squared residuals"] = "sum of squared residuals"
    objective_value: float
    """Over the runs of all fitted parabolas, in squared loss."""
    vertices: tuple[Vertex, ...]
    """One per budget, ascending; flagged ones are here too."""
    exponent: float | None
    """d log x* / d log C; None with fewer than three usable budgets."""
    coefficient: float | None
    """x* at C = 1 FLOP."""
    warnings: tuple[str, ...] = ()
    bootstrap: Bootstrap | None = field(default=None, repr=False)
    """Draws of `exponent` and `coefficient` (resamples,), and of the vertices' `x` and `loss` (resamples, budgets)."""

    @property
    def ci(self) -> dict[str, tuple[float, float]]:
        """Bootstrap intervals of exponent and coefficient; empty without a bootstrap."""
        return {} if self.bootstrap is None else self.bootstrap.intervals()

    def optimum(self, budget: float | Array) -> Array:
        """Compute-optimal x at `budget`, coefficient * C^exponent; NaN if there is no power law."""
        if self.exponent is None or self.coefficient is None:
            return np.full_like(np.asarray(budget, float), np.nan)
        return self.coefficient * np.asarray(budget, float) ** self.exponent

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and finite numbers for JSON."""
        return record(self) | to_plain({"ci": self.ci})


def fit_isoflop(
    table: pd.DataFrame,
    *,
    budget: str,
    x: str,
    loss: str,
    include_flagged: bool = False,
    bootstrap: int = 0,
    seed: int = 0,
    cluster: str | None = None,
) -> IsoflopFit:
    """Fit a parabola in log x to each budget and a power law through the minima.

    Args:
        table: one row per run.
        budget: column of the compute budget; rows of one budget hold exactly the same value.
        x: column of the quantity to optimise: parameters, tokens or FLOPs per token.
        loss: column of the loss.
        include_flagged: let the power law use flagged minima too, as most published fits do. Minima of parabolas
            that open downwards are never used.
        bootstrap: number of resamples, 0 for none. Residuals are resampled over all budgets together (scaled for the
            three coefficients of each parabola), because a budget of five runs cannot lose one.
        seed: of the resampling.
        cluster: column whose equal values share a draw.

    Raises:
        UserError: a column is missing or holds anything but finite numbers above zero.
    """
    budgets, sizes, losses = positive_columns(table, budget, x, loss)
    values, group = np.unique(budgets, return_inverse=True)
    vertices, residuals, spans = [], np.full(len(losses), np.nan), []
    for i, value in enumerate(values):
        rows = group == i
        vertices.append(_vertex(float(value), sizes[rows], losses[rows]))
        residuals[rows] = losses[rows] - vertices[i].predict(sizes[rows])
        spans.append(sizes[rows].max() / sizes[rows].min())

    usable = np.array([v.status is VertexStatus.OK or (include_flagged and v.is_minimum) for v in vertices])
    warnings = _warnings(vertices, spans, int(usable.sum())) + duplicate_warnings(table, budget, x, loss)
    exponent = coefficient = None
    if usable.sum() >= MIN_BUDGETS:
        optima = np.array([v.x for v in vertices])
        exponent, coefficient = (float(value) for value in _power_law(values[usable], optima[usable]))
    draws = None
    if bootstrap:
        labels = cluster_labels(table, cluster)
        draws = _bootstrap(
            vertices, group, np.log10(sizes), losses - residuals, residuals, usable, bootstrap, seed, labels
        )
        vertices = [
            replace(
                vertex,
                x_interval=draws.interval(draws.draws["x"][:, i]),
                loss_interval=draws.interval(draws.draws["loss"][:, i]),
            )
            for i, vertex in enumerate(vertices)
        ]
    return IsoflopFit(
        n=len(table),
        status=FitStatus.TOO_FEW_POINTS if exponent is None else FitStatus.CONVERGED,
        objective_value=float(np.nansum(residuals**2)),
        vertices=tuple(vertices),
        exponent=exponent,
        coefficient=coefficient,
        warnings=warnings,
        bootstrap=draws,
    )


def _power_law(budgets: Array, optima: Array) -> tuple[Array, Array]:
    """Least squares of log10 x* (..., budgets) on log10 C: exponent and coefficient, (...)."""
    log_budgets = np.log10(budgets)
    centred = log_budgets - log_budgets.mean()
    log_optima = np.log10(optima)
    exponent = log_optima @ centred / (centred @ centred)
    return exponent, 10 ** (log_optima.mean(axis=-1) - exponent * log_budgets.mean())


def _bootstrap(
    vertices: list[Vertex],
    group: np.ndarray,
    z: Array,
    fitted: Array,
    residuals: Array,
    usable: np.ndarray,
    resamples: int,
    seed: int,
    labels: np.ndarray | None,
) -> Bootstrap:
    """Refits to the parabolas plus drawn residuals. A resample fails if a parabola that counts opens downwards."""
    counts = np.bincount(group)[group]
    spread = np.sqrt(counts / np.maximum(counts - 3.0, 1.0))
    pool = np.where(counts > 3, residuals * spread, np.nan)  # through three points a parabola leaves none
    losses = fitted + resample_residuals(pool, resamples, seed, labels)
    x = np.full((resamples, len(vertices)), np.nan)
    loss = x.copy()
    for i, vertex in enumerate(vertices):
        if np.isfinite(vertex.curvature):
            rows = group == i
            centre = z[rows].mean()
            c0, c1, c2 = np.linalg.pinv(np.vander(z[rows] - centre, 3, increasing=True)) @ losses[:, rows].T
            x[:, i], loss[:, i] = _minimum(centre, c0, c1, c2)
    counted = usable if usable.sum() >= MIN_BUDGETS else np.array([v.is_minimum for v in vertices])
    good = np.isfinite(x[:, counted]).all(axis=1)
    draws = {"x": x[good], "loss": loss[good]}
    if usable.sum() >= MIN_BUDGETS:
        budgets = np.array([v.budget for v in vertices])
        draws["exponent"], draws["coefficient"] = _power_law(budgets[usable], x[good][:, usable])
    return Bootstrap(draws=draws, resamples=resamples, failed=int(np.sum(~good)), seed=seed)


def _vertex(budget: float, sizes: Array, losses: Array) -> Vertex:
    z = np.log10(sizes)
    n_sizes = len(np.unique(z))
    if n_sizes < 3:
        nan = float("nan")
        return Vertex(
            budget=budget, x=nan, loss=nan, curvature=nan, n=len(z),
            status=VertexStatus.TOO_FEW, coefficients=(nan, nan, nan),
        )  # fmt: skip
    centre = z.mean()  # z^2 of uncentred sizes is almost collinear with z
    c0, c1, c2 = np.polynomial.polynomial.polyfit(z - centre, losses, 2)
    x, minimum = _minimum(centre, c0, c1, c2)
    shift = -c1 / (2 * c2) if c2 else np.inf
    middle, half = (z.max() + z.min()) / 2, (z.max() - z.min()) / 2
    off_centre = abs(centre + shift - middle) / (2 * half)
    if n_sizes < MIN_SIZES:
        status = VertexStatus.TOO_FEW
    elif not c2 > 0:
        status = VertexStatus.CURVATURE
    elif off_centre > 0.5:
        status = VertexStatus.OUTSIDE_RANGE
    elif off_centre > MAX_OFF_CENTRE:
        status = VertexStatus.OFF_CENTRE
    else:
        status = VertexStatus.OK
    return Vertex(
        budget=budget,
        x=float(x),
        loss=float(minimum),
        curvature=float(c2),
        n=len(z),
        status=status,
        coefficients=(float(c0 - c1 * centre + c2 * centre**2), float(c1 - 2 * c2 * centre), float(c2)),
    )


def _minimum(centre: float, c0: Array, c1: Array, c2: Array) -> tuple[Array, Array]:
    """x and loss where parabolas around `centre` are lowest; NaN where they open downwards."""
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        x, loss = 10.0 ** (centre - c1 / (2 * c2)), c0 - c1**2 / (4 * c2)
    there = (c2 > 0) & np.isfinite(x) & (x > 0)
    return np.where(there, x, np.nan), np.where(there, loss, np.nan)


def _warnings(vertices: list[Vertex], spans: list[float], n_usable: int) -> tuple[str, ...]:
    found = []
    for status in VertexStatus:
        flagged = [f"{v.budget:.3g}" for v in vertices if v.status is status]
        if flagged and status is not VertexStatus.OK:
            found.append(f"{status}: the minimum of budget {', '.join(flagged)} is flagged")
    wide = [f"{v.budget:.3g} ({span:.0f}x)" for v, span in zip(vertices, spans, strict=True) if span > MAX_SPAN]
    if wide:
        found.append(f"wide grid: budget {', '.join(wide)}; parabolas are biased beyond about +-4x of the optimum")
    if n_usable < MIN_BUDGETS:
        found.append(f"no exponent: {n_usable} usable budgets, a power law wants {MIN_BUDGETS}")
    return tuple(found)
