"""The losses of several methods at their compute optima: one fit per budget, with errors from all known sources.

At one budget the loss of method m at size x, averaged over the seeds of that size, is

    y = a_m + b_m z + c z^2 + misfit + seed / sqrt(number of seeds),    z = log10 x.

All methods share the curvature c (primary analysis), or each method has its own (reported beside it). Guests take c and
the common variances from the other methods, the members, and move neither. The misfit is an
effect of the size, which the seeds of a size share: the deviation from a parabola. Seeds scatter around the mean of
their size. `noise` has their variances; neither is counted twice.

To first order, the minimum a_m - b_m^2 / (4 c) is the fitted curve at a fixed z. The error of a minimum, or of a
difference of two, is therefore that of a weighted sum of the size means. Sums of two estimated variances have the
degrees of freedom of Satterthwaite (1946); intervals are Student's.
"""

import math
from collections.abc import Container, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import numpy as np

from peerscale.config.study import MIN_SIZES
from peerscale.laws.linear_fit import Array, LinearFit, StudentValue
from peerscale.laws.parabola import OptimumStatus, minimum, parabola_optima, recentred
from peerscale.stats.noise import Noise, estimate_noise


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate(StudentValue):
    """A loss or a difference of losses, in nats per token, with its error by source."""

    fit_se: float | None
    """Error from the misfit of sizes; with one seed per size it includes seeds. None: one size, so nothing was fitted.
    """
    seeds_se: float | None
    """Error from seeds; None if no size has several: seeds are then in `fit_se` or, with one size, left out."""
    sequences_se: float | None
    """Error from sampling the validation sequences; None if losses of sequences are not known."""
    rate_se: float | None = None
    """Error from the choice of learning rates; None if it is not known and so left out."""

    def with_sequences(self, losses: Array) -> Self:
        """The estimate with the error from sampling sequences added; `losses` has its value for each sequence."""
        sampled = float(losses.std(ddof=1)) / math.sqrt(len(losses))
        return self._with(sampled, len(losses) - 1, sequences_se=sampled)

    def with_rates(self, errors: Sequence[tuple[float, float]]) -> Self:
        """The estimate with the errors of learning rates (standard error, degrees of freedom) added, if there are any.

        All errors from brackets use the same estimated scatter, so the errors of their variances are not independent.
        """
        if not errors:
            return self
        rates, together = math.hypot(*(se for se, _ in errors)), sum(se**2 / math.sqrt(df) for se, df in errors)
        return self._with(rates, rates**4 / together**2 if together else math.inf, rate_se=rates)

    def _with(self, se: float, df: float, **source: float) -> Self:
        """The estimate with an independent error added, which is also stored as that of its source."""
        both = satterthwaite([(self.se**2, self.df), (se**2, df)])
        return replace(self, se=math.hypot(self.se, se), df=both, **source)


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimum:
    """The optimum of a method: the minimum of its curve."""

    name: Any
    """As given to the fit."""
    status: OptimumStatus
    x: float
    """Size at the minimum; NaN if `status` has no number."""
    loss: float
    x_interval: tuple[float, float]
    sizes: tuple[float, ...]
    """x of the fitted size means, ascending."""
    coefficients: tuple[float, float, float]
    """(a, b, c) of the parabola in log10 x."""
    weights: Array
    """Weights of the size means (points,); the weighted sum is `loss`."""


@dataclass(frozen=True, kw_only=True)
class OptimaFit:
    """The fit of one budget."""

    names: tuple[Any, ...]
    """The methods: any hashable values, never looked into."""
    method: Array
    """Index into `names` of each size mean (points,)."""
    x: Array
    losses: Array
    """Size means (points,)."""
    n_seeds: Array
    """Number of runs behind each size mean (points,)."""
    seed_squares: Array
    """Sum of the squared deviations of a method's runs from the means of their sizes (methods,)."""
    seed_df: Array
    """Its degrees of freedom (methods,)."""
    members: Array
    """Which methods are no guests (methods,); all of them if all are guests."""
    shared: bool
    at_least: int

    @classmethod
    def of(
        cls, names: Sequence[Hashable], x: Array, losses: Array, *, guests: Container[Hashable] = (),
        shared: bool = True, at_least: int = MIN_SIZES,
    ) -> Self:  # fmt: skip
        """Fit runs (runs,) of one budget.

        Args:
            names: each run's method, any hashable value.
            x: size of each run, such as FLOPs per token; equal sizes of a method are seeds of one model.
            losses: nats per token.
            guests: names of methods that change nothing of the others.
            shared: whether all methods share one curvature or each has its own.
            at_least: fewest sizes for which a method gets a number.
        """
        methods = tuple(dict.fromkeys(names))
        index = np.array([methods.index(name) for name in names])
        points, run = np.unique(np.column_stack([index, x]), axis=0, return_inverse=True)
        run = run.reshape(-1)
        n_seeds = np.bincount(run)
        means = np.bincount(run, losses) / n_seeds
        squares = np.bincount(index, (losses - means[run]) ** 2, len(methods))
        method, members = points[:, 0].astype(int), np.array([name not in guests for name in methods])
        return cls(
            names=methods, method=method, x=points[:, 1], losses=means, n_seeds=n_seeds, seed_squares=squares,
            seed_df=np.bincount(method, n_seeds - 1.0, len(methods)), shared=shared, at_least=at_least,
            members=members if members.any() else ~members,
        )  # fmt: skip

    @cached_property
    def centre(self) -> float:
        """The origin of z: z = log10 x - centre."""
        return float(np.log10(self.x).mean())

    @cached_property
    def z(self) -> Array:
        return np.log10(self.x) - self.centre

    @cached_property
    def linear(self) -> LinearFit:
        """The regression of the size means: an intercept and a slope per method, then the curvatures."""
        one, z = (self.method[:, None] == np.arange(len(self.names))).astype(float), self.z[:, None]
        design, instruments = np.hstack([one, one * z, z**2 if self.shared else one * z**2]), None
        if self.shared and not self.members.all():
            instruments = design.copy()
            instruments[:, -1] *= self.members[self.method]
        return LinearFit(design=design, values=self.losses, instruments=instruments)

    @cached_property
    def _curves(self) -> Array:
        """Which coefficients of `linear` are a, b and c of each method, (3, methods)."""
        first = np.arange(len(self.names))
        return np.stack([first, first + len(first), 2 * len(first) + (0 if self.shared else 1) * first])

    def curve(self, name: Hashable) -> Array:
        """(a, b, c) of a method in z."""
        return self.linear.coefficients[self._curves[:, self.names.index(name)]]

    def to_curve(self, name: Hashable) -> Array:
        """Weights of the size means (3, points) whose sums are (a, b, c) of a method."""
        return self.linear.solution[self._curves[:, self.names.index(name)]]

    def optimum(self, name: Hashable) -> Optimum:
        """The minimum of one method."""
        method, curve = self.names.index(name), self.curve(name)
        here, to_curve = self.method == method, self.to_curve(name)
        at, status = minimum(curve, self.z[here], self.at_least)
        if not status.has_number:
            at = math.nan  # makes all results below NaN
        weights = np.array([1, at, at**2]) @ to_curve
        slope = self.estimate(np.array([0, 1, 2 * at]) @ to_curve)  # of the curve at `at`: zero, but with an error
        reach = (slope.interval[1] - slope.value) / (2 * curve[2])
        x = float(10 ** (at + self.centre))
        return Optimum(
            name=name, status=status, x=x, loss=float(weights @ self.losses), weights=weights,
            x_interval=(float(x * 10**-reach), float(x * 10**reach)), sizes=tuple(np.sort(self.x[here]).tolist()),
            coefficients=recentred(curve, self.centre),
        )  # fmt: skip

    def optima_of(self, losses: Array) -> tuple[Array, Array]:
        """x and loss of every method's optimum, (draws, methods) each, for other size means `losses` (draws, points).

        NaN as in `parabola_optima`.
        """
        curves = self.linear.coefficients_of(losses)[:, self._curves]
        return parabola_optima(np.moveaxis(curves, 1, 0), self.centre)

    def estimate(self, weights: Array, sequences: Array | None = None) -> Estimate:
        """A weighted sum of the size means, with its error.

        Args:
            weights: (points,), such as the difference of the weights of two optima.
            sequences: losses of the same validation sequences at every size, (points, sequences).
        """
        by_misfit, by_seeds, df = self._error(weights)
        found = Estimate(
            value=float(weights @ self.losses), se=math.sqrt(by_misfit + by_seeds), df=df, fit_se=math.sqrt(by_misfit),
            seeds_se=math.sqrt(by_seeds) if self.replicated else None, sequences_se=None,
        )  # fmt: skip
        return found if sequences is None else found.with_sequences(weights @ sequences)

    @property
    def replicated(self) -> bool:
        """Whether the scatter of seeds is known: whether a member has several seeds of a size."""
        return bool(self.seed_df[self.members].any())

    @property
    def seeds_sd(self) -> float:
        """Standard deviation of seeds in nats, pooled over methods; NaN without replicates."""
        return math.sqrt(self.seed_squares.sum() / self.seed_df.sum()) if self.seed_df.any() else math.nan

    @cached_property
    def _free(self) -> tuple[Array, Array]:
        """Degrees of freedom of each method's residuals, and the share of one seed's variance in their mean square."""
        free, n = 1 - self.linear.leverage, len(self.names)
        free = np.where(free > 1e-9, free, 0.0)  # a size that its method's curve passes through tells nothing
        df, shares = (np.bincount(self.method, each, n) for each in (free, free / self.n_seeds))
        return df, np.divide(shares, df, out=np.zeros(n), where=df > 0)

    @cached_property
    def noise(self) -> Noise:
        """The variances of size means, by method."""
        (df, shares), squares = self._free, np.bincount(self.method, self.linear.residuals**2, len(self.names))
        return estimate_noise(squares, df, shares, self.seed_squares, self.seed_df, self.members)

    @property
    def variances(self) -> Array:
        """Variance of every size mean (points,) from misfit and seeds; NaN without degrees of freedom."""
        noise, m = self.noise, self.method
        return noise.multiple[m] * (noise.misfit + noise.seeds[m] / self.n_seeds)

    def _error(self, weights: Array) -> tuple[float, float, float]:
        """Variances of a weighted sum of the size means from misfit and seeds, and the degrees of freedom of both."""
        noise, m, n = self.noise, self.method, len(self.names)
        by_point = noise.multiple[m] * weights**2
        by_misfit = np.bincount(m, by_point, n) * noise.misfit
        by_seeds = np.bincount(m, by_point / self.n_seeds, n) * noise.seeds
        if not self.linear.df:
            df = math.nan
        elif not noise.misfit:
            df = satterthwaite(zip(by_seeds, noise.seeds_df, strict=True))
        else:  # a sum of independent mean squares: of residuals, which have the misfit in common, and of seeds
            residual = np.bincount(m, by_point, n) * (noise.misfit + noise.seeds * self._free[1])
            residual_df = min(satterthwaite(zip(residual, noise.residual_df, strict=True)), self.linear.df)
            rest = by_misfit + by_seeds - residual
            df = satterthwaite([(residual.sum(), residual_df), *zip(rest, noise.seeds_df, strict=True)])
        return float(by_misfit.sum()), float(by_seeds.sum()), df


def holm(p: Array, n_tests: int = 0) -> Array:
    """p-values of a family of tests, corrected for their number (Holm 1979).

    The number is `n_tests`, or that of the known values in `p` if it is larger. Tests without a value count as p = 1.
    """
    order = np.argsort(p)[: np.isfinite(p).sum()]
    corrected = np.full(len(p), np.nan)
    at_least = max(n_tests, len(order)) - np.arange(len(order))
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * at_least), 1)
    return corrected


def satterthwaite(parts: Iterable[tuple[float, float]]) -> float:
    """Degrees of freedom of a sum of estimated variances, given as (variance, df) (Satterthwaite 1946)."""
    parts = list(parts)
    total = sum(variance for variance, _ in parts)
    below = sum(variance**2 / df for variance, df in parts if df > 0)
    return total**2 / below if below > 0 else math.inf
