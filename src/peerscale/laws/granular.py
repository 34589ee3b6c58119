"""Fine-grained mixtures of experts (Krajewski et al. 2024, equation 9): L = c + (g / G^gamma + a) / N^alpha + b / D^beta.

N is the number of non-embedding parameters, all experts included, D of tokens, G the granularity: how many experts one
full-sized expert is cut into. At realistic noise b, beta and c are not identifiable, predictions are.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd

from peerscale.laws.bootstrap import Bootstrap
from peerscale.laws.objective import Objective
from peerscale.laws.parametric import Number, Surface
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

IS_LOG = np.array([True, False, True, False, True, False, True])  # log g, gamma, log a, alpha, log b, beta, log c
START_EXPONENTS = (0.05, 0.15, 0.4, 0.8)


@dataclass(frozen=True, kw_only=True)
class GranularLaw:
    """The law for raw counts; coefficients are numbers or arrays of draws."""

    a: Number
    alpha: Number
    b: Number
    beta: Number
    g: Number
    gamma: Number
    c: Number

    def surface(self, granularity: Number) -> Surface:
        """The law at one granularity: E = c, A = g / G^gamma + a, B = b.

        Its `optimum` takes the FLOPs per total parameter and token, which depend on the share of active experts.
        """
        size = self.g / np.asarray(granularity, float) ** self.gamma + self.a
        return Surface(E=self.c, A=size, B=self.b, alpha=self.alpha, beta=self.beta)

    def predict(self, params: Number, tokens: Number, granularity: Number) -> Number:
        """Loss at N = `params`, D = `tokens`, G = `granularity`, in raw counts."""
        return self.surface(granularity).predict(params, tokens)


@dataclass(frozen=True, kw_only=True)
class GranularFit(GranularLaw):
    """A fitted law."""

    law: Literal["granular"] = "granular"
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
        """Bootstrap intervals of the coefficients; empty without a bootstrap."""
        return {} if self.bootstrap is None else self.bootstrap.intervals()

    @property
    def draws(self) -> GranularLaw:
        """The law with arrays of bootstrap draws as coefficients. Raises ValueError without a bootstrap."""
        return GranularLaw(**Bootstrap.require(self.bootstrap).draws)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and finite numbers for JSON; ci included."""
        return record(self) | to_plain({"ci": self.ci})


def fit_granular(
    table: pd.DataFrame,
    *,
    params: str,
    tokens: str,
    granularity: str,
    loss: str,
    objective: Objective | str = Objective.HUBER,
    delta: float = 0.1,
    bootstrap: int = 0,
    seed: int = 0,
    cluster: str | None = None,
) -> GranularFit:
    """Fit L = c + (g / G^gamma + a) / N^alpha + b / D^beta.

    Args:
        table: one row per run.
        params, tokens, granularity, loss: columns of N, D, G and the loss.
        objective: what to minimise; the authors' Huber(0.1) of the raw residual is least squares in effect.
        delta: where Huber turns linear.
        bootstrap: number of resamples of the runs, 0 for none.
        seed: of the resampling.
        cluster: column whose equal values are drawn together.

    Raises:
        UserError: a column is missing or holds anything but finite numbers above zero; fewer than seven runs.
    """
    *sizes, losses = positive_columns(table, params, tokens, granularity, loss)
    require_points(table, len(IS_LOG), "granular")
    logs = [np.log(size) for size in sizes]
    centres = np.array([log.mean() for log in logs])
    n, d, g = (centre - log for centre, log in zip(centres, logs, strict=True))
    one, zero = np.ones_like(losses), np.zeros_like(losses)
    terms = np.stack(
        [
            np.stack([one, g, zero, n, zero, zero, zero], axis=1),
            np.stack([zero, zero, one, n, zero, zero, zero], axis=1),
            np.stack([zero, zero, zero, zero, one, d, zero], axis=1),
            np.stack([zero, zero, zero, zero, zero, zero, one], axis=1),
        ]
    )
    problem = PowerSum(terms=terms, loss=losses, objective=Objective(objective), delta=delta)
    to_raw = np.eye(len(IS_LOG))
    to_raw[0, [1, 3]] = centres[2], centres[0]
    to_raw[2, 3], to_raw[4, 5] = centres[0], centres[1]
    coefficients, value, status, draws = fit_powers(
        problem,
        Coordinates(names=("g", "gamma", "a", "alpha", "b", "beta", "c"), is_log=IS_LOG, to_raw=to_raw),
        START_EXPONENTS,
        bootstrap=bootstrap,
        seed=seed,
        clusters=cluster_labels(table, cluster),
    )
    return GranularFit(
        **coefficients,
        n=len(table),
        status=status,
        objective_name=problem.objective,
        objective_value=value,
        delta=delta,
        warnings=duplicate_warnings(table, params, tokens, granularity, loss),
        bootstrap=draws,
    )
