"""The losses of several methods at their compute optima: one fit of a budget, with errors that hold what is known.

At one budget the loss of method m at size x, averaged over the seeds of that size, is

    y = a_m + b_m z + c z^2 + misfit + seed / sqrt(number of seeds),    z = log10 x.

The curvature c is shared by all methods (the primary analysis) or each method's own (shown beside it). The misfit is an
effect of the size: the seeds of one size share it. It holds what no parabola describes, and scatters about the fit with
variance tau^2; seeds scatter about the mean of their size with variance sigma^2, pooled over methods. Neither is
counted twice: the residuals of the size means hold tau^2 + sigma^2 / seeds, from which tau^2 follows by moments.

The minimum a_m - b_m^2 / (4 c) is to first order the fitted curve at a fixed z, so an error of it, or of a difference
of two, is that of a weighted sum of the size means. Sums of two estimated variances have the degrees of freedom of
Satterthwaite (1946); intervals are Student's.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

import numpy as np
from scipy.stats import f as fisher
from scipy.stats import t as student

from peerscale.laws.bootstrap import LEVEL
from peerscale.laws.results import Array

MIN_SIZES = 4
"""Sizes that a method needs at a budget: one more than a parabola has coefficients."""
OUTER = 0.2
"""A minimum in the outermost fifth of the sampled log range is flagged."""


class OptimumStatus(StrEnum):
    """Whether a minimum can be trusted. Only `ok` and `off_centre` have a number."""

    OK = "ok"
    OFF_CENTRE = "off_centre"
    """In the outermost fifth of the sampled range: the number is there, with a flag."""
    OUTSIDE_RANGE = "outside_range"
    """Beyond the sampled sizes: no number, as it would be an extrapolation."""
    CURVATURE = "curvature"
    """The fit is flat or opens downwards: there is no minimum."""
    TOO_FEW = "too_few"
    """Fewer than four sizes: no number."""

    @property
    def has_number(self) -> bool:
        return self in (OptimumStatus.OK, OptimumStatus.OFF_CENTRE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A loss or a difference of losses, in nats per token, with its error by source."""

    value: float
    se: float
    """Standard error from all parts that are known."""
    df: float
    """Degrees of freedom of `se`."""
    fit_se: float | None
    """Part of the misfit of sizes; with one seed a size it holds seeds too. None: one size, so nothing was fitted."""
    seeds_se: float | None
    """Part of seeds; None where no size has several, so that they are within `fit_se` or, with one size, left out."""
    sequences_se: float | None
    """Part of the sampling of validation sequences; None where losses of sequences are not known."""

    @property
    def interval(self) -> tuple[float, float]:
        """Student's 95 % interval."""
        half = float(student.ppf((1 + LEVEL) / 2, self.df)) * self.se
        return self.value - half, self.value + half

    @property
    def p(self) -> float:
        """Two-sided probability of a value so far from zero, were the true one zero."""
        return float(2 * student.sf(abs(self.value) / self.se, self.df)) if self.se > 0 else math.nan


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimum:
    """The fitted minimum of one method."""

    name: str
    status: OptimumStatus
    x: float
    """Where it lies; NaN where `status` has no number."""
    loss: float
    x_interval: tuple[float, float]
    sizes: tuple[float, ...]
    """The x of the size means that were fitted, ascending."""
    coefficients: tuple[float, float, float]
    """(a, b, c) of the parabola in log10 x."""
    weights: Array
    """Of the size means (points,), whose weighted sum is `loss`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Equality:
    """F test of one curvature for all methods against one for each."""

    f: float
    df: tuple[int, int]
    p: float


@dataclass(frozen=True, kw_only=True)
class OptimaFit:
    """The fit of one budget."""

    names: tuple[str, ...]
    method: Array
    """Index into `names` of each size mean (points,)."""
    x: Array
    losses: Array
    """Size means (points,)."""
    n_seeds: Array
    """Runs behind each size mean (points,)."""
    design: Array
    """(points, coefficients): an intercept and a slope for each method, then curvatures."""
    centre: float
    """log10 x is counted from here."""
    seeds_variance: float
    """sigma^2, pooled over methods and sizes; NaN without replicates."""
    seeds_df: int
    shared: bool
    at_least: int

    @classmethod
    def of(
        cls, names: Sequence[str], x: Array, losses: Array, *, shared: bool = True, at_least: int = MIN_SIZES
    ) -> Self:
        """Fit runs (runs,) of one budget.

        Args:
            names: of the method of each run.
            x: size of each run, such as FLOPs per token; equal sizes of a method are seeds of one model.
            losses: nats per token.
            shared: one curvature for all methods, or one for each.
            at_least: sizes that a method needs for a number.
        """
        methods = tuple(dict.fromkeys(names))
        index = np.array([methods.index(name) for name in names])
        points, run = np.unique(np.column_stack([index, x]), axis=0, return_inverse=True)
        run = run.reshape(-1)
        n_seeds = np.bincount(run)
        means = np.bincount(run, losses) / n_seeds
        method, sizes = points[:, 0].astype(int), points[:, 1]
        freedom = int(len(losses) - len(means))
        scatter = float(((losses - means[run]) ** 2).sum()) / freedom if freedom else math.nan
        z = np.log10(sizes)
        centre = float(z.mean())
        return cls(
            names=methods, method=method, x=sizes, losses=means, n_seeds=n_seeds, centre=centre,
            design=_design(method, z - centre, len(methods), shared), seeds_variance=scatter, seeds_df=freedom,
            shared=shared, at_least=at_least,
        )  # fmt: skip

    @property
    def z(self) -> Array:
        return np.log10(self.x) - self.centre

    @property
    def solution(self) -> Array:
        """Matrix (coefficients, points) from size means to coefficients: ordinary least squares."""
        return np.linalg.pinv(self.design)

    @property
    def df(self) -> int:
        """Degrees of freedom of the residuals."""
        return len(self.losses) - int(np.linalg.matrix_rank(self.design))

    @property
    def residuals(self) -> Array:
        return self.losses - self.design @ (self.solution @ self.losses)

    @property
    def scatter(self) -> float:
        """Standard deviation of the size means about the fit, nats; NaN without degrees of freedom."""
        return math.sqrt(float(self.residuals @ self.residuals) / self.df) if self.df else math.nan

    def curve(self, name: str, losses: Array | None = None) -> Array:
        """(a, b, c) of a method in z, of `losses` (..., points) or of the fitted ones: (3, ...)."""
        coefficients = self.solution @ (self.losses if losses is None else losses).T
        i, n = self.names.index(name), len(self.names)
        return coefficients[[i, n + i, 2 * n + (0 if self.shared else i)]]

    def optimum(self, name: str) -> Optimum:
        """The minimum of one method."""
        a, b, c = map(float, self.curve(name))
        here = self.method == self.names.index(name)
        z = self.z[here]
        at = -b / (2 * c) if c > 0 else math.nan
        status = _status(at, z, c, self.at_least)
        spread = self.error(self._weights(name, np.array([0.0, -1 / (2 * c), -at / c]))) if status.has_number else None
        reach = float(student.ppf((1 + LEVEL) / 2, spread[1])) * spread[0] if spread else math.nan
        weights = self._weights(name, np.array([1, at, at**2])) if status.has_number else np.full(len(self.x), np.nan)
        raw = (a - b * self.centre + c * self.centre**2, b - 2 * c * self.centre, c)
        x = 10 ** (at + self.centre) if status.has_number else math.nan
        return Optimum(
            name=name, status=status, x=x, loss=a - b**2 / (4 * c) if status.has_number else math.nan,
            x_interval=(x * 10**-reach, x * 10**reach), sizes=tuple(np.sort(self.x[here]).tolist()),
            coefficients=raw, weights=weights,
        )  # fmt: skip

    def minima(self, losses: Array) -> tuple[Array, Array]:
        """x and loss of every method's minimum for other size means, losses (draws, points): (draws, methods) each.

        NaN where the curve opens downwards.
        """
        curves = np.stack([self.curve(name, losses) for name in self.names], axis=-1)
        a, b, c = curves
        with np.errstate(all="ignore"):
            x, loss = 10.0 ** (self.centre - b / (2 * c)), a - b**2 / (4 * c)
        opens = c > 0
        return np.where(opens, x, np.nan), np.where(opens, loss, np.nan)

    def _weights(self, name: str, gradient: Array) -> Array:
        """Of the size means, for a function of a method's coefficients with this gradient (3,)."""
        i, n = self.names.index(name), len(self.names)
        return gradient @ self.solution[[i, n + i, 2 * n + (0 if self.shared else i)]]

    def estimate(self, weights: Array, sequences: Array | None = None) -> Estimate:
        """The weighted sum of the size means with its error.

        Args:
            weights: (points,), such as the difference of two optima's.
            sequences: losses of the same validation sequences at every size, (points, sequences).
        """
        se, df, fit, seeds = self._parts(weights)
        sampled = None
        if sequences is not None:
            each = weights @ sequences
            sampled = float(each.std(ddof=1)) / math.sqrt(len(each))
            df = _satterthwaite([(se**2, df), (sampled**2, len(each) - 1)])
            se = math.hypot(se, sampled)
        return Estimate(
            value=float(weights @ self.losses), se=se, df=df, fit_se=fit, seeds_se=seeds, sequences_se=sampled
        )

    def error(self, weights: Array) -> tuple[float, float]:
        """Standard error of a weighted sum of the size means, from misfit and seeds, and its degrees of freedom."""
        return self._parts(weights)[:2]

    def variances(self) -> tuple[Array, float]:
        """Variance of every size mean (points,), from misfit and seeds, and degrees of freedom of their scale."""
        misfit, seeds, df = self._components()
        return misfit + (seeds / self.n_seeds if math.isfinite(seeds) else np.zeros(len(self.x))), df

    def _components(self) -> tuple[float, float, float]:
        """tau^2, sigma^2 (NaN without replicates) and degrees of freedom for both together."""
        rss, df = float(self.residuals @ self.residuals), self.df
        if not df:
            return math.nan, self.seeds_variance, math.nan
        if not self.seeds_df:
            return rss / df, math.nan, df
        leverage = np.einsum("pc,cp->p", self.design, self.solution)
        per_seed = float(((1 - leverage) / self.n_seeds).sum())  # of sigma^2 in the residuals' sum of squares
        misfit = (rss - self.seeds_variance * per_seed) / df
        if misfit > 0:
            return misfit, self.seeds_variance, df
        pooled = (rss + self.seeds_variance * self.seeds_df) / (per_seed + self.seeds_df)
        return 0.0, pooled, df + self.seeds_df

    def _parts(self, weights: Array) -> tuple[float, float, float | None, float | None]:
        """Standard error, degrees of freedom, and the parts of misfit and seeds."""
        misfit, seeds, df = self._components()
        squares = float(weights @ weights)
        fit = math.sqrt(squares * misfit)
        if not self.seeds_df:
            return fit, df, fit, None
        by_seed = float(weights**2 @ (1 / self.n_seeds))
        total = squares * misfit + by_seed * seeds
        if misfit > 0:  # the total is a sum of two independent mean squares, of the residuals and of the seeds
            residual = squares * self.scatter**2
            df = _satterthwaite([(residual, self.df), (total - residual, self.seeds_df)])
        return math.sqrt(total), df, fit, math.sqrt(by_seed * seeds)


def equality_of_curvatures(shared: OptimaFit, own: OptimaFit) -> Equality | None:
    """Whether the methods' curvatures differ by more than chance; None with one method or no degrees of freedom."""
    constraints = shared.df - own.df
    if not (constraints and own.df):
        return None
    rss, own_rss = (float(fit.residuals @ fit.residuals) for fit in (shared, own))
    f = (rss - own_rss) / constraints / (own_rss / own.df)
    return Equality(f=f, df=(constraints, own.df), p=float(fisher.sf(f, constraints, own.df)))


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Probabilities of a family of tests, corrected for their number (Holm 1979); NaN stays out of the count."""
    known = sorted((value, key) for key, value in p.items() if math.isfinite(value))
    corrected, largest = dict.fromkeys(p, math.nan), 0.0
    for i, (value, key) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - i) * value))
        corrected[key] = largest
    return corrected


def _design(method: Array, z: Array, n_methods: int, shared: bool) -> Array:
    one = (method[:, None] == np.arange(n_methods)).astype(float)
    square = (z**2)[:, None] if shared else one * (z**2)[:, None]
    return np.hstack([one, one * z[:, None], square])


def _status(at: float, z: Array, curvature: float, at_least: int) -> OptimumStatus:
    if len(z) < at_least:
        return OptimumStatus.TOO_FEW
    if not curvature > 0:
        return OptimumStatus.CURVATURE
    place = (at - z.min()) / np.ptp(z)
    if not 0 <= place <= 1:
        return OptimumStatus.OUTSIDE_RANGE
    return OptimumStatus.OK if OUTER <= place <= 1 - OUTER else OptimumStatus.OFF_CENTRE


def _satterthwaite(parts: Sequence[tuple[float, float]]) -> float:
    """Degrees of freedom of a sum of estimated variances, each given with its own (Satterthwaite 1946)."""
    total = sum(variance for variance, _ in parts)
    below = sum(variance**2 / df for variance, df in parts if df > 0)
    return total**2 / below if below > 0 else math.inf
