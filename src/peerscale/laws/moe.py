"""Laws of layers with experts: routed (Clark et al. 2022) and granular (Krajewski et al. 2024).

Routed language models (equations 7 and 8): log10 L = a n + b e + c n e + d. n is log10 of the dense parameters, which
are the parameters that one token uses; e = log10 E_hat, where E_hat is the saturated number of experts E:
1 / E_hat = 1 / (E - 1 + 1 / (1 / E_start - 1 / E_max)) + 1 / E_max. Dense models have E = 1, E_hat = E_start.

Fine-grained mixtures (equation 9): L = c + (g / G^gamma + a) / N^alpha + b / D^beta, where N is the number of
non-embedding parameters (including all experts), D the number of tokens, and G the granularity: the number of experts
into which one full-sized expert is divided. With realistic noise b, beta and c are not identifiable, but predictions
are.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Unpack

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from peerscale.errors import UserError
from peerscale.laws.fitting import Fit, Number, Resampling, estimate
from peerscale.laws.least_squares import Objective, Problem, power_problem
from peerscale.laws.linear_fit import Array, LinearFit
from peerscale.laws.table import positive_columns

E_START_RANGE = np.log([0.1, 1e3])
RATIO_RANGE = (0.05, 15.0)
"""Range of ln E_start and of ln(E_max / E_start)."""
ROUTED_STARTS = np.log([(start, ratio) for start in (1.5, 5) for ratio in (30, 300)])
GRANULAR_STARTS = (0.15, 0.6)


@dataclass(frozen=True, kw_only=True)
class RoutedLaw:
    """Clark et al.'s law for raw counts; coefficients are numbers or arrays of draws."""

    a: Number
    b: Number
    c: Number
    d: Number
    E_start: Number
    E_max: Number

    def predict(self, dense_params: ArrayLike, experts: ArrayLike) -> Number:
        """Loss 10^(a n + b e + c n e + d)."""
        n, e = np.log10(np.asarray(dense_params, float)), np.log10(saturated_experts(experts, self.E_start, self.E_max))
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
    """A fitted routed law; E_start and E_max are weakly identified."""

    law: ClassVar[str] = "routed"
    form: ClassVar[type] = RoutedLaw
    derived: ClassVar[tuple[str, ...]] = ("rms_log10",)

    @property
    def rms_log10(self) -> float:
        """Root mean squared residual of log10 L."""
        return float(np.sqrt(self.objective_value / self.n) / np.log(10))


def fit_routed(
    table: pd.DataFrame, *, dense_params: str, experts: str, loss: str, **resampling: Unpack[Resampling]
) -> RoutedFit:
    """Fit log10 L = a n + b e + c n e + d by least squares.

    Args:
        table: one row per run, of one router and the dense models (experts = 1).
        dense_params, experts, loss: names of columns.
        resampling: see `Resampling`; by default the largest dense sizes are held out.

    Raises:
        UserError: a column is missing or has values that are not finite numbers above zero; there are fewer than six
            runs, or fewer than one expert.
    """
    columns = (dense_params, experts, loss)
    sizes, counts, losses = positive_columns(table, *columns, law=RoutedFit.law, at_least=6)
    if counts.min() < 1:
        raise UserError(f"column {experts!r} must be at least 1 (a dense model), found {counts.min():g}")
    n, centre = np.log10(sizes), np.log10(sizes).mean()
    to_raw = np.eye(6)  # of coordinates a, b, c, d (with n - centre instead of n), ln E_start, ln (E_max / E_start)
    to_raw[1, 2] = to_raw[3, 0] = -centre
    to_raw[5, 4] = 1.0
    problem = Problem(
        names=("a", "b", "c", "d", "E_start", "E_max"), to_raw=to_raw, is_log=np.arange(6) >= 4,
        bounds=(
            np.array([-np.inf] * 4 + [E_START_RANGE[0], RATIO_RANGE[0]]),
            np.array([np.inf] * 4 + [E_START_RANGE[1], RATIO_RANGE[1]]),
        ),
        starts=_routed_starts(n - centre, counts, np.log10(losses)), law=partial(_routed_losses, n - centre, counts),
        loss=losses, objective=Objective.MSE_LOG,
    )  # fmt: skip
    return estimate(RoutedFit, table, columns, problem, sizes, **resampling)


def _routed_starts(n: Array, experts: Array, log_loss: Array) -> Array:
    """Points (starts, 6): for given E_start and E_max the law is linear (variable projection)."""
    starts = []
    for start, ratio in ROUTED_STARTS:
        e = np.log10(saturated_experts(experts, np.exp(start), np.exp(start + ratio)))
        linear = LinearFit(design=np.stack([n, e, n * e, np.ones_like(e)], axis=1), values=log_loss)
        starts.append([*linear.coefficients, start, ratio])
    return np.array(starts)


def _routed_losses(n: Array, experts: Array, point: Array) -> tuple[Array, Array]:
    """Losses (runs,) of the routed law and their Jacobian (runs, 6), for sizes with log10 `n`, see `fit_routed`.

    The Jacobian is the imaginary part after an imaginary step (Squire and Trapp 1998), which is exact to rounding.
    """
    a, b, c, d, start, ratio = np.vstack([point, point + 1e-20j * np.eye(6)]).T[:, :, None]
    e = np.log10(saturated_experts(experts, np.exp(start), np.exp(start + ratio)))
    losses = 10 ** (a * n + b * e + c * n * e + d)
    return losses[0].real, losses[1:].imag.T / 1e-20


def saturated_experts(experts: ArrayLike, start: Number, maximum: Number) -> Number:
    """E_hat for E_start = `start` and E_max = `maximum` (Clark et al. 2022, equation 7)."""
    gap = 1 / start - 1 / maximum
    return 1 / (1 / (np.asarray(experts, float) - 1 + 1 / gap) + 1 / maximum)


@dataclass(frozen=True, kw_only=True)
class GranularLaw:
    """Krajewski et al.'s law for raw counts; coefficients are numbers or arrays of draws."""

    a: Number
    alpha: Number
    b: Number
    beta: Number
    g: Number
    gamma: Number
    c: Number

    def predict(self, params: ArrayLike, tokens: ArrayLike, granularity: ArrayLike) -> Number:
        """Loss at N = `params`, D = `tokens`, G = `granularity`, in raw counts."""
        n, d, g = (np.asarray(count, float) for count in (params, tokens, granularity))
        return self.c + (self.g * g**-self.gamma + self.a) * n**-self.alpha + self.b * d**-self.beta


@dataclass(frozen=True, kw_only=True)
class GranularFit(GranularLaw, Fit):
    """A fitted granular law."""

    law: ClassVar[str] = "granular"
    form: ClassVar[type] = GranularLaw


def fit_granular(
    table: pd.DataFrame, *, params: str, tokens: str, granularity: str, loss: str,
    objective: Objective | str = Objective.HUBER, delta: float = 0.1, **resampling: Unpack[Resampling],
) -> GranularFit:  # fmt: skip
    """Fit L = c + (g / G^gamma + a) / N^alpha + b / D^beta.

    Args:
        table: one row per run.
        params, tokens, granularity, loss: columns of N, D, G and the loss.
        objective, delta: as in `fit_parametric`; the authors' Huber(0.1) is in effect least squares.
        resampling: see `Resampling`; by default the runs with the largest N D are held out.

    Raises:
        UserError: a column is missing or has values that are not finite numbers above zero; there are fewer than seven
            runs.
    """
    columns = (params, tokens, granularity, loss)
    *variables, losses = positive_columns(table, *columns, law=GranularFit.law, at_least=7)
    log_n, log_d, log_g = map(np.log, variables)
    powers = {"g": {"gamma": log_g, "alpha": log_n}, "a": {"alpha": log_n}, "b": {"beta": log_d}, "c": {}}
    problem = power_problem(powers, losses, objective=objective, delta=delta, start_exponents=GRANULAR_STARTS)
    return estimate(GranularFit, table, columns, problem, variables[0] * variables[1], **resampling)
