"""Routed language models (Clark et al. 2022, equations 7 and 8): log10 L = a n + b e + c n e + d.

n = log10 of the dense parameters, those that one token sees; e = log10 E_hat of the number of experts E, saturated:
1 / E_hat = 1 / (E - 1 + 1 / (1 / E_start - 1 / E_max)) + 1 / E_max. Dense models are E = 1, E_hat = E_start.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pandas as pd

from peerscale.errors import UserError
from peerscale.laws.bootstrap import Bootstrap, resample_counts
from peerscale.laws.objective import Objective, ResidualProblem
from peerscale.laws.parametric import Number
from peerscale.laws.results import (
    Array,
    FitStatus,
    as_floats,
    cluster_labels,
    duplicate_warnings,
    positive_columns,
    record,
    require_points,
    to_plain,
)
from peerscale.laws.solver import Coordinates, diagnose, minimise

# Coordinates a, b, c, d (n centred), s = ln E_start, t = ln(E_max / E_start).
LOWER = np.array([-np.inf] * 4 + [np.log(0.1), 0.05])
UPPER = np.array([np.inf] * 4 + [np.log(1e3), 15.0])
IS_LOG = np.array([False] * 4 + [True] * 2)
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

    def saturated_experts(self, experts: Number) -> Number:
        """E_hat (Clark et al. 2022, equation 7)."""
        gap = 1 / self.E_start - 1 / self.E_max
        return 1 / (1 / (np.asarray(experts, float) - 1 + 1 / gap) + 1 / self.E_max)

    def predict(self, dense_params: Number, experts: Number) -> Number:
        """Loss 10^(a n + b e + c n e + d)."""
        n, e = np.log10(np.asarray(dense_params, float)), np.log10(self.saturated_experts(experts))
        return 10 ** (self.a * n + self.b * e + self.c * n * e + self.d)

    def effective_params(self, dense_params: Number, experts: Number) -> Number:
        """Size of the dense model (E = 1) with the same loss (Clark et al. 2022, section 5.1).

        log10 = (log10 L - d - b e_1) / (a + c e_1), e_1 = log10 E_start.
        """
        e1 = np.log10(self.E_start)
        log_loss = np.log10(self.predict(dense_params, experts))
        return 10 ** ((log_loss - self.d - self.b * e1) / (self.a + self.c * e1))


@dataclass(frozen=True, kw_only=True)
class RoutedFit(RoutedLaw):
    """A fitted law; E_start and E_max are weakly identified."""

    law: Literal["routed"] = "routed"
    n: int
    status: FitStatus
    objective_name: Literal["mse-log10"] = "mse-log10"
    objective_value: float
    """Sum of squared log10 residuals."""
    rms_log10: float
    """Root of their mean."""
    warnings: tuple[str, ...] = ()
    bootstrap: Bootstrap | None = field(default=None, repr=False)

    @property
    def ci(self) -> dict[str, tuple[float, float]]:
        """Bootstrap intervals of the coefficients; empty without a bootstrap."""
        return {} if self.bootstrap is None else self.bootstrap.intervals()

    @property
    def draws(self) -> RoutedLaw:
        """The law with arrays of bootstrap draws as coefficients. Raises ValueError without a bootstrap."""
        return RoutedLaw(**Bootstrap.require(self.bootstrap).draws)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and finite numbers for JSON; ci included."""
        return record(self) | to_plain({"ci": self.ci})


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
        UserError: a column is missing or holds anything but finite numbers above zero; fewer than six runs.
    """
    sizes, counts, losses = positive_columns(table, dense_params, experts, loss)
    require_points(table, len(LOWER), "routed")
    if counts.min() < 1:
        raise UserError(f"column {experts!r} must be at least 1 (a dense model), found {counts.min():g}")
    n, log_loss = np.log10(sizes), np.log10(losses)
    centre = n.mean()
    n = n - centre

    def residuals(points: Array, members: np.ndarray) -> tuple[Array, Array]:
        a, b, c, d, start, ratio = points.T[:, :, None]
        e, by_start, by_ratio = _saturation(counts, start, ratio)
        slope = b + c * n
        one = np.ones_like(e)
        jacobian = np.stack([n * one, e, n * e, one, slope * by_start, slope * by_ratio], axis=1)
        return a * n + e * slope + d - log_loss, jacobian

    starts = np.zeros((len(STARTS), len(LOWER)))
    starts[:, 4:] = STARTS
    for row, (start, ratio) in zip(starts, STARTS, strict=True):
        e = _saturation(counts, start, ratio)[0]
        row[:4] = np.linalg.lstsq(np.stack([n, e, n * e, np.ones_like(n)], axis=1), log_loss, rcond=None)[0]
    problem = ResidualProblem(residuals=residuals, objective=Objective.MSE)
    solution = minimise(problem, starts, LOWER, UPPER)
    best = solution.best()
    point, value = solution.points[best], float(solution.values[best])
    offsets, jacobian = residuals(point[None], np.zeros(1, int))
    to_raw = np.eye(len(LOWER))
    to_raw[1, 2] = to_raw[3, 0] = -centre
    to_raw[5, 4] = 1
    coordinates = Coordinates(names=("a", "b", "c", "d", "E_start", "E_max"), is_log=IS_LOG, to_raw=to_raw)
    status = diagnose(coordinates, jacobian[0].T, offsets[0], point, solution.at_bound[best])

    draws = None
    if bootstrap:
        weights = resample_counts(len(n), bootstrap, seed, cluster_labels(table, cluster))
        refits = minimise(replace(problem, weights=weights), np.tile(point, (bootstrap, 1)), LOWER, UPPER)
        draws = Bootstrap.of(refits, coordinates, seed)
    return RoutedFit(
        **as_floats(coordinates.coefficients(point)),
        n=len(table),
        status=status,
        objective_value=value,
        rms_log10=float(np.sqrt(value / len(n))),
        warnings=duplicate_warnings(table, dense_params, experts, loss),
        bootstrap=draws,
    )


def _saturation(experts: Array, start: Number, ratio: Number) -> tuple[Array, Array, Array]:
    """e = log10 E_hat and its derivatives by ln E_start and ln(E_max / E_start)."""
    inverse_max = np.exp(-start - ratio)
    gap = np.exp(-start) - inverse_max
    growth = 1 + (experts - 1) * gap
    inverse = gap / growth + inverse_max
    scale = -1 / (inverse * np.log(10))
    by_start = scale * (-gap / growth**2 - inverse_max)
    by_ratio = scale * (inverse_max / growth**2 - inverse_max)
    return -np.log10(inverse), by_start, by_ratio
