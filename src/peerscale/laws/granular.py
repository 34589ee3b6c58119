"""Fine-grained mixtures of experts (Krajewski et al. 2024, equation 9).

L = c + (g / G^gamma + a) / N^alpha + b / D^beta, where N is the number of non-embedding parameters, all experts
included, D of tokens, G the granularity: into how many experts one full-sized expert is cut. At realistic noise b,
beta and c are not identifiable; predictions are.
"""

from dataclasses import dataclass
from typing import ClassVar, Unpack

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from peerscale.laws.fit import Fit, Resampling, estimate
from peerscale.laws.objective import Objective
from peerscale.laws.parametric import Surface
from peerscale.laws.powers import power_problem
from peerscale.laws.results import Number
from peerscale.laws.table import positive_columns

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

    def surface(self, granularity: ArrayLike) -> Surface:
        """The law at one granularity: E = c, A = g / G^gamma + a, B = b.

        Its `optimum` takes the FLOPs per *total* parameter and token, which depend on the share of active experts.
        """
        size = self.g * np.asarray(granularity, float) ** -self.gamma + self.a
        return Surface(E=self.c, A=size, B=self.b, alpha=self.alpha, beta=self.beta)

    def predict(self, params: ArrayLike, tokens: ArrayLike, granularity: ArrayLike) -> Number:
        """Loss at N = `params`, D = `tokens`, G = `granularity`, in raw counts."""
        return self.surface(granularity).predict(params, tokens)


@dataclass(frozen=True, kw_only=True)
class GranularFit(GranularLaw, Fit):
    """A fitted law."""

    law: ClassVar[str] = "granular"
    form: ClassVar[type] = GranularLaw


def fit_granular(
    table: pd.DataFrame,
    *,
    params: str,
    tokens: str,
    granularity: str,
    loss: str,
    objective: Objective | str = Objective.HUBER,
    delta: float = 0.1,
    **resampling: Unpack[Resampling],
) -> GranularFit:
    """Fit L = c + (g / G^gamma + a) / N^alpha + b / D^beta.

    Args:
        table: one row per run.
        params, tokens, granularity, loss: columns of N, D, G and the loss.
        objective, delta: as in `fit_parametric`; the authors' Huber(0.1) is least squares in effect.
        resampling: see `Resampling`; by default the runs of the largest N D are held out.

    Raises:
        UserError: a column is missing or holds anything but finite numbers above zero; fewer than seven runs.
    """
    columns = (params, tokens, granularity, loss)
    *variables, losses = positive_columns(table, *columns, law=GranularFit.law, at_least=7)
    log_n, log_d, log_g = map(np.log, variables)
    powers = {"g": {"gamma": log_g, "alpha": log_n}, "a": {"alpha": log_n}, "b": {"beta": log_d}, "c": {}}
    problem = power_problem(powers, losses, objective=objective, delta=delta, start_exponents=START_EXPONENTS)
    return estimate(GranularFit, table, columns, problem, variables[0] * variables[1], **resampling)
