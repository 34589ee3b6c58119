"""Approach 3 (Hoffmann et al. 2022, section 3.3): the surface L(N, D) = E + A / N^alpha + B / D^beta.

N is the number of parameters, D of training tokens, L the loss in nats per token. The paper minimises the sum of
Huber(1e-3) over log residuals; its printed coefficients are an early stop of that objective (Besiroglu et al. 2024).
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd

from peerscale.errors import UserError
from peerscale.laws.bootstrap import Bootstrap
from peerscale.laws.objective import Objective
from peerscale.laws.powers import PowerSum, fit_powers
from peerscale.laws.results import (
    Array,
    FitStatus,
    cluster_labels,
    duplicate_warnings,
    positive_columns,
    record,
    require_points,
    to_plain,
)
from peerscale.laws.solver import Coordinates

Number = float | Array
IS_LOG = np.array([True, False, True, False, True])  # log A, alpha, log B, beta, log E
START_EXPONENTS = (0.1, 0.2, 0.35, 0.5, 0.8, 1.2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Allocation:
    """How to spend a budget: what minimises the surface subject to C = flops_per_parameter_token * N * D."""

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
        """N* ~ C^a with a = beta / (alpha + beta) (Hoffmann et al. 2022, equation 4)."""
        return self.beta / (self.alpha + self.beta)

    @property
    def b(self) -> Number:
        """D* ~ C^b with b = alpha / (alpha + beta) (Hoffmann et al. 2022, equation 4)."""
        return self.alpha / (self.alpha + self.beta)

    def predict(self, params: Number, tokens: Number) -> Number:
        """Loss at N = `params`, D = `tokens`, in raw counts."""
        return (
            self.E + self.A / np.asarray(params, float) ** self.alpha + self.B / np.asarray(tokens, float) ** self.beta
        )

    def optimum(self, budget: Number, flops_per_parameter_token: float = 6.0) -> Allocation:
        """Compute-optimal allocation of `budget` FLOPs (Hoffmann et al. 2022, equation 4).

        N* = G (C / k)^a, D* = (C / k)^b / G, G = (alpha A / (beta B))^(1 / (alpha + beta)), for C = k N D.
        """
        products = np.asarray(budget, float) / flops_per_parameter_token
        ratio = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        params, tokens = ratio * products**self.a, products**self.b / ratio
        return Allocation(params=params, tokens=tokens, loss=self.predict(params, tokens))


@dataclass(frozen=True, kw_only=True)
class ParametricFit(Surface):
    """A fitted surface; `predict` and `optimum` use its coefficients."""

    law: Literal["parametric"] = "parametric"
    n: int
    status: FitStatus
    objective_name: Objective
    objective_value: float
    """The sum over runs."""
    delta: float
    warnings: tuple[str, ...] = ()
    bootstrap: Bootstrap | None = field(default=None, repr=False)

    @property
    def ci(self) -> dict[str, tuple[float, float]]:
        """Bootstrap intervals of E, A, B, alpha, beta, a and b; empty without a bootstrap."""
        if self.bootstrap is None:
            return {}
        draws = self.draws
        return self.bootstrap.intervals() | {name: self.bootstrap.interval(getattr(draws, name)) for name in "ab"}

    @property
    def draws(self) -> Surface:
        """The surface with arrays of bootstrap draws as coefficients: `fit.draws.optimum(C).loss` are draws of L*.

        Raises ValueError without a bootstrap.
        """
        return Surface(**Bootstrap.require(self.bootstrap).draws)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and finite numbers for JSON; a, b and ci included."""
        return record(self) | to_plain({"a": self.a, "b": self.b, "ci": self.ci})


def fit_parametric(
    table: pd.DataFrame,
    *,
    params: str,
    tokens: str | None = None,
    flops: str | None = None,
    loss: str,
    objective: Objective | str = Objective.HUBER_LOG,
    delta: float = 1e-3,
    bootstrap: int = 0,
    seed: int = 0,
    cluster: str | None = None,
) -> ParametricFit:
    """Fit L(N, D) = E + A / N^alpha + B / D^beta.

    Args:
        table: one row per run.
        params, loss: columns of N and of the loss.
        tokens: column of D; or else
        flops: column of the training FLOPs C, from which D = C / (6 N).
        objective: what to minimise.
        delta: where Huber turns linear, in units of the residual; unused by the squared objectives.
        bootstrap: number of resamples of the runs, 0 for none.
        seed: of the resampling.
        cluster: column whose equal values are drawn together, such as the run of several checkpoints.

    Raises:
        UserError: both or neither of tokens and flops, a column missing or with anything but finite numbers above
            zero, fewer than five runs, all FLOPs equal.
    """
    if (tokens is None) == (flops is None):
        raise UserError("give exactly one of tokens and flops")
    sizes, amounts, losses = positive_columns(table, params, tokens or flops, loss)
    require_points(table, len(IS_LOG), "parametric")
    if flops is not None:
        if amounts.min() == amounts.max():
            raise UserError(f"column {flops!r} holds one budget, {amounts[0]:g}: the law needs at least two")
        amounts = amounts / (6 * sizes)

    log_sizes, log_amounts = np.log(sizes), np.log(amounts)
    centre, middle = log_sizes.mean(), log_amounts.mean()
    one, zero = np.ones_like(losses), np.zeros_like(losses)
    terms = np.stack(
        [
            np.stack([one, centre - log_sizes, zero, zero, zero], axis=1),
            np.stack([zero, zero, one, middle - log_amounts, zero], axis=1),
            np.stack([zero, zero, zero, zero, one], axis=1),
        ]
    )
    problem = PowerSum(terms=terms, loss=losses, objective=Objective(objective), delta=delta)
    to_raw = np.eye(len(IS_LOG))
    to_raw[0, 1], to_raw[2, 3] = centre, middle
    coefficients, value, status, draws = fit_powers(
        problem,
        Coordinates(names=("A", "alpha", "B", "beta", "E"), is_log=IS_LOG, to_raw=to_raw),
        START_EXPONENTS,
        bootstrap=bootstrap,
        seed=seed,
        clusters=cluster_labels(table, cluster),
    )
    warnings = duplicate_warnings(table, params, tokens or flops or "", loss)
    if np.linalg.matrix_rank(np.stack([one, log_sizes - centre, log_amounts - middle], axis=1), tol=1e-6) < 3:
        status = FitStatus.NOT_IDENTIFIABLE
        warnings += ("log N and log D lie on a line: the data cannot tell size from tokens",)

    return ParametricFit(
        **coefficients,
        n=len(table),
        status=status,
        objective_name=problem.objective,
        objective_value=value,
        delta=delta,
        warnings=warnings,
        bootstrap=draws,
    )
