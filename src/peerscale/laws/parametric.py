"""Approach 3 (Hoffmann et al. 2022, section 3.3): the surface L(N, D) = E + A / N^alpha + B / D^beta.

N is the number of parameters, D the number of training tokens, L the loss in nats per token. The paper minimises the
sum of Huber(1e-3) of log residuals; its printed coefficients come from an optimiser that stopped early (Besiroglu et
al. 2024).
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Unpack

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from peerscale.errors import UserError
from peerscale.laws.fitting import Fit, Number, Resampling, estimate
from peerscale.laws.least_squares import FitStatus, Objective, power_problem
from peerscale.laws.table import positive_columns

START_EXPONENTS = (0.2, 0.6)


@dataclass(frozen=True, kw_only=True, slots=True)
class Allocation:
    """How to divide a compute budget between parameters and tokens."""

    params: Number
    tokens: Number
    loss: Number


@dataclass(frozen=True, kw_only=True)
class Surface:
    """L(N, D) = E + A / N^alpha + B / D^beta for raw counts; coefficients are numbers or arrays of draws."""

    E: Number
    A: Number
    B: Number
    alpha: Number
    beta: Number

    @property
    def a(self) -> Number:
        """N* ~ C^a: a = beta / (alpha + beta) (Hoffmann et al. 2022, equation 4)."""
        return self.beta / (self.alpha + self.beta)

    @property
    def b(self) -> Number:
        """D* ~ C^b: b = alpha / (alpha + beta) (Hoffmann et al. 2022, equation 4)."""
        return self.alpha / (self.alpha + self.beta)

    @property
    def scale(self) -> Number:
        """G = (alpha A / (beta B))^(1 / (alpha + beta)) (Hoffmann et al. 2022, equation 4)."""
        return (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))

    def predict(self, params: ArrayLike, tokens: ArrayLike) -> Number:
        """Loss at N = `params`, D = `tokens`, in raw counts."""
        params, tokens = np.asarray(params, float), np.asarray(tokens, float)
        return self.E + self.A * params**-self.alpha + self.B * tokens**-self.beta

    def optimum(self, budget: ArrayLike, flops_per_parameter_token: float = 6.0) -> Allocation:
        """Compute-optimal allocation of `budget` FLOPs C = k N D, k = `flops_per_parameter_token`.

        N* = G (C / k)^a, D* = (C / k)^b / G (Hoffmann et al. 2022, equation 4).
        """
        products = np.asarray(budget, float) / flops_per_parameter_token
        params, tokens = self.scale * products**self.a, products**self.b / self.scale
        return Allocation(params=params, tokens=tokens, loss=self.predict(params, tokens))


@dataclass(frozen=True, kw_only=True)
class ParametricFit(Surface, Fit):
    """A fitted surface; `predict` and `optimum` use its coefficients."""

    law: ClassVar[str] = "parametric"
    form: ClassVar[type] = Surface
    derived: ClassVar[tuple[str, ...]] = ("a", "b")


def fit_parametric(
    table: pd.DataFrame, *, params: str, tokens: str | None = None, flops: str | None = None, loss: str,
    objective: Objective | str = Objective.HUBER_LOG, delta: float = 1e-3, **resampling: Unpack[Resampling],
) -> ParametricFit:  # fmt: skip
    """Fit L(N, D) = E + A / N^alpha + B / D^beta.

    Args:
        table: one row per run.
        params, tokens, flops, loss: columns of N, of D or else of the training FLOPs C = 6 N D, and of the loss.
        objective, delta: what to minimise, and the residual at which Huber becomes linear.
        resampling: see `Resampling`; by default the runs with the most FLOPs are held out.

    Raises:
        UserError: both or neither of tokens and flops are given; a column is missing or has values that are not finite
            numbers above zero; there are fewer than five runs, or all FLOPs are equal.
    """
    second = tokens or flops
    if second is None or (tokens and flops):
        raise UserError("give exactly one of tokens and flops")
    sizes, amounts, losses = positive_columns(table, params, second, loss, law=ParametricFit.law, at_least=5)
    products = amounts if flops else 6 * sizes * amounts
    if flops:
        if amounts.min() == amounts.max():
            raise UserError(f"column {flops!r} holds one budget, {amounts[0]:g}: the law needs at least two")
        amounts = amounts / (6 * sizes)
    log_n, log_d = np.log(sizes), np.log(amounts)
    powers = {"A": {"alpha": log_n}, "B": {"beta": log_d}, "E": {}}
    problem = power_problem(powers, losses, objective=objective, delta=delta, start_exponents=START_EXPONENTS)
    fit = estimate(ParametricFit, table, (params, second, loss), problem, products, **resampling)
    if min(np.ptp(log_n), np.ptp(log_d)) > 0 and np.corrcoef(log_n, log_d)[0, 1] > 1 - 1e-9:
        line = ("log D rises in proportion to log N: the data cannot tell size from tokens",)
        fit = replace(fit, status=FitStatus.NOT_IDENTIFIABLE, warnings=fit.warnings + line)
    return fit
