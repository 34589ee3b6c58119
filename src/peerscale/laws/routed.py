"""Routed language models (Clark et al. 2022, equations 7 and 8): log10 L = a n + b e + c n e + d.

n = log10 of the dense parameters, those that one token sees; e = log10 E_hat of the number of experts E, saturated:
1 / E_hat = 1 / (E - 1 + 1 / (1 / E_start - 1 / E_max)) + 1 / E_max. Dense models are E = 1, E_hat = E_start.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from peerscale.errors import UserError
from peerscale.laws.bootstrap import Bootstrap, resample_counts
from peerscale.laws.fit import Fit
from peerscale.laws.objective import Misfit, Objective
from peerscale.laws.results import Array, Number
from peerscale.laws.solver import Coordinates, refit, solve
from peerscale.laws.table import cluster_labels, duplicate_warnings, positive_columns

LN10 = np.log(10)
START_RANGE = np.log([0.1, 1e3])
RATIO_RANGE = (0.05, 15.0)
"""Of ln E_start and of ln(E_max / E_start)."""
STARTS = np.log([(start, ratio) for start in (1.1, 2, 4, 8) for ratio in (10, 50, 200, 1000)])


@dataclass(frozen=True, kw_only=True)
class RoutedLaw:
    """The law for raw counts; coefficients are numbers or arrays of draws."""

    a: Number
    b: Number
    c: Number
    d: Number
    E_start: Number
    E_max: Number

    def saturated_experts(self, experts: ArrayLike) -> Number:
        """E_hat (Clark et al. 2022, equation 7)."""
        gap = 1 / self.E_start - 1 / self.E_max
        return 1 / (1 / (np.asarray(experts, float) - 1 + 1 / gap) + 1 / self.E_max)

    def predict(self, dense_params: ArrayLike, experts: ArrayLike) -> Number:
        """Loss 10^(a n + b e + c n e + d)."""
        n, e = np.log10(np.asarray(dense_params, float)), np.log10(self.saturated_experts(experts))
        return 10 ** (self.a * n + self.b * e + self.c * n * e + self.d)

    def effective_params(self, dense_params: ArrayLike, experts: ArrayLike) -> Number:
        """Size of the dense model (E = 1) with the same loss (Clark et al. 2022, section 5.1).

        log10 = (log10 L - d - b e_1) / (a + c e_1), e_1 = log10 E_start.
        """
        e1 = np.log10(self.E_start)
        log_loss = np.log10(self.predict(dense_params, experts))
        return 10 ** ((log_loss - self.d - self.b * e1) / (self.a + self.c * e1))


@dataclass(frozen=True, kw_only=True)
class RoutedFit(RoutedLaw, Fit):
    """A fitted law; E_start and E_max are weakly identified."""

    law: ClassVar[str] = "routed"
    form: ClassVar[type] = RoutedLaw
    rms_log10: float
    """Root mean squared residual of log10 L."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """The law as an `objective.Problem`; coordinates a, b, c, d for centred n, ln E_start, ln(E_max / E_start)."""

    n: Array
    """Centred log10 of the dense parameters, (runs,)."""
    experts: Array
    log_loss: Array
    """log10, (runs,)."""

    def residuals(self, points: Array, members: Array) -> Array:
        """Residuals of log10 L, (R, runs), at points (R, 6)."""
        return self.derivatives(points, members)[0]

    def derivatives(self, points: Array, members: Array) -> tuple[Array, Array, None]:
        """Residuals and Jacobian."""
        a, b, c, d, start, ratio = points.T[:, :, None]
        e, by_start, by_ratio = self.saturation(start, ratio)
        slope = b + c * self.n
        one = np.ones_like(e)
        jacobian = np.stack([self.n * one, e, self.n * e, one, slope * by_start, slope * by_ratio], axis=1)
        return a * self.n + e * slope + d - self.log_loss, jacobian, None

    def saturation(self, start: Number, ratio: Number) -> tuple[Array, Array, Array]:
        """e = log10 E_hat, and its derivatives by ln E_start and ln(E_max / E_start)."""
        inverse_max = np.exp(-start - ratio)
        gap = np.exp(-start) - inverse_max
        growth = 1 + (self.experts - 1) * gap
        inverse = gap / growth + inverse_max
        by_start = (gap / growth**2 + inverse_max) / (inverse * LN10)
        by_ratio = (inverse_max - inverse_max / growth**2) / (inverse * LN10)
        return -np.log10(inverse), by_start, by_ratio

    def starts(self) -> Array:
        """A grid of E_start and E_max with a, b, c, d by least squares (variable projection), (starts, 6)."""
        starts = []
        for start, ratio in STARTS:
            e = self.saturation(start, ratio)[0]
            columns = np.stack([self.n, e, self.n * e, np.ones_like(e)], axis=1)
            starts.append([*np.linalg.lstsq(columns, self.log_loss, rcond=None)[0], start, ratio])
        return np.array(starts)


def fit_routed(
    table: pd.DataFrame,
    *,
    dense_params: str,
    experts: str,
    loss: str,
    bootstrap: int = 0,
    seed: int = 0,
    cluster: str | None = None,
) -> RoutedFit:
    """Fit log10 L = a n + b e + c n e + d by least squares.

    Args:
        table: one row per run, of one router and the dense models (experts = 1).
        dense_params, experts, loss: columns.
        bootstrap: number of resamples of the runs, 0 for none.
        seed: of the resampling.
        cluster: column whose equal values are drawn together.

    Raises:
        UserError: a column is missing or holds anything but finite numbers above zero, fewer than six runs, fewer
            than one expert.
    """
    columns = (dense_params, experts, loss)
    sizes, counts, losses = positive_columns(table, *columns, law=RoutedFit.law, at_least=6)
    if counts.min() < 1:
        raise UserError(f"column {experts!r} must be at least 1 (a dense model), found {counts.min():g}")
    n = np.log10(sizes)
    centre = n.mean()
    problem = Routing(n=n - centre, experts=counts, log_loss=np.log10(losses))
    to_raw = np.eye(6)
    to_raw[1, 2] = to_raw[3, 0] = -centre
    to_raw[5, 4] = 1.0
    coordinates = Coordinates(
        names=("a", "b", "c", "d", "E_start", "E_max"),
        is_log=np.arange(6) >= 4,
        to_raw=to_raw,
        lower=np.array([-np.inf] * 4 + [START_RANGE[0], RATIO_RANGE[0]]),
        upper=np.array([np.inf] * 4 + [START_RANGE[1], RATIO_RANGE[1]]),
    )
    misfit = Misfit(problem=problem, objective=Objective.MSE)
    point, value, status = solve(misfit, coordinates, problem.starts())
    draws = None
    if bootstrap:
        weights = resample_counts(len(n), bootstrap, seed, cluster_labels(table, cluster))
        draws = Bootstrap.of(refit(misfit, coordinates, point, weights), coordinates, seed)
    return RoutedFit(
        **{name: float(coefficient) for name, coefficient in coordinates.coefficients(point).items()},
        n=len(table),
        status=status,
        objective_name="mse-log10",
        objective_value=value,
        rms_log10=float(np.sqrt(value / len(n))),
        warnings=duplicate_warnings(table, *columns),
        bootstrap=draws,
    )
