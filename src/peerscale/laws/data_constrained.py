"""Repeated data (Muennighoff et al. 2023, section 3.1): tokens seen again are worth less, as are surplus parameters.

L = E + A / N'^alpha + B / D'^beta with the effective counts (equations 5 and 6)

    D' = U_D + U_D R_D* (1 - exp(-R_D / R_D*)),   U_D = min(unique tokens, D),   R_D = D / U_D - 1 repetitions,
    N' = U_N + U_N R_N* (1 - exp(-R_N / R_N*)),   U_N = min(N_opt(U_D), N),      R_N = N / U_N - 1,

where N_opt(U_D) is the size for which U_D tokens are compute-optimal.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Unpack

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.linalg import block_diag

from peerscale.errors import UserError
from peerscale.laws.fitting import Fit, Resampling, estimate, positive_columns
from peerscale.laws.parametric import START_EXPONENTS, Surface
from peerscale.laws.solver import Coordinates, Number, Numerical, Objective, power_problem, solve

CONSTANT_RANGE = (np.log(0.01), np.log(1e4))
START_CONSTANTS = np.log([(params, tokens) for params in (1, 5, 30) for tokens in (2, 15, 100)])


@dataclass(frozen=True, kw_only=True)
class DataConstrainedLaw(Surface):
    """A surface with the two constants of repetition; coefficients are numbers or arrays of draws."""

    R_N: Number
    R_D: Number
    """R_N* and R_D*: about how many repetitions are worth having (the paper: 5.31 and 15.39)."""

    def predict(self, params: ArrayLike, tokens: ArrayLike, unique_tokens: ArrayLike | None = None) -> Number:
        """Loss at N = `params`, D = `tokens`, of which `unique_tokens` (None: all) are different, in raw counts.

        N_opt(U_D) = G (G U_D)^(a / b), from equation 4 of Hoffmann et al. 2022.
        """
        if unique_tokens is None:
            return super().predict(params, tokens)
        params, tokens = np.asarray(params, float), np.asarray(tokens, float)
        base_d = np.minimum(unique_tokens, tokens)
        base_n = np.minimum(self.scale * (self.scale * base_d) ** (self.a / self.b), params)
        n = base_n * (1 - self.R_N * np.expm1((1 - params / base_n) / self.R_N))
        d = base_d * (1 - self.R_D * np.expm1((1 - tokens / base_d) / self.R_D))
        return super().predict(n, d)


@dataclass(frozen=True, kw_only=True)
class DataConstrainedFit(DataConstrainedLaw, Fit):
    """A fitted law; `optimum` is that of data without limit."""

    law: ClassVar[str] = "data_constrained"
    form: ClassVar[type] = DataConstrainedLaw
    derived: ClassVar[tuple[str, ...]] = ("a", "b")


def fit_data_constrained(
    table: pd.DataFrame,
    *,
    params: str,
    tokens: str,
    unique_tokens: str,
    loss: str,
    objective: Objective | str = Objective.HUBER_LOG,
    delta: float = 1e-3,
    **resampling: Unpack[Resampling],
) -> DataConstrainedFit:
    """Fit all seven coefficients together, starting from the surface through the runs that repeat no data.

    Args:
        table: one row per run, five or more of them without repetition.
        params, tokens, unique_tokens, loss: columns of N, D, the different tokens among D, and the loss.
        objective, delta, resampling: as in `fit_parametric`.

    Raises:
        UserError: a column is missing or holds anything but finite numbers above zero; too few runs.
    """
    columns = (params, tokens, unique_tokens, loss)
    n, d, unique, losses = positive_columns(table, *columns, law=DataConstrainedFit.law, at_least=7)
    once = d <= unique
    if once.sum() < 5:
        raise UserError(f"{once.sum()} rows repeat no data ({tokens!r} <= {unique_tokens!r}): five are needed")
    powers = {"A": {"alpha": np.log(n[once])}, "B": {"beta": np.log(d[once])}, "E": {}}
    simple = power_problem(powers, losses[once], objective=objective, delta=delta, start_exponents=START_EXPONENTS)
    (point, _, _), base = solve(simple), simple.coordinates
    coordinates = Coordinates(
        names=(*base.names, "R_N", "R_D"),
        is_log=np.append(base.is_log, [True, True]),
        to_raw=block_diag(base.to_raw, np.eye(2)),
        lower=np.append(base.lower, [CONSTANT_RANGE[0]] * 2),
        upper=np.append(base.upper, [CONSTANT_RANGE[1]] * 2),
    )
    law = Numerical(form=DataConstrainedLaw, coordinates=coordinates, variables=(n, d, unique))
    starts = np.array([[*point, *constants] for constants in START_CONSTANTS])
    problem = replace(simple, law=law, loss=losses, coordinates=coordinates, starts=starts)
    return estimate(DataConstrainedFit, table, columns, problem, 6 * n * d, **resampling)
