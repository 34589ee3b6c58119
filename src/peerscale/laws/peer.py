"""A law of our own for retrieved experts, in active parameters N, tokens D, experts X and active experts G.

    L = E + A / (N^alpha X^chi G^gamma) + H / (X^eta G^theta) + B / D^beta

N counts the parameters that one token uses, X the experts of a layer, G (PEER's granularity, section 2.3 of He 2024)
those of them that one token retrieves. Nothing published says which terms matter, so that several forms, each with
some of them, are fitted, and the simplest of those that extrapolate best along every axis is chosen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Unpack

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from peerscale.errors import UserError
from peerscale.laws.fit import Fit, Resampling, estimate
from peerscale.laws.holdout import largest, predict_held_out
from peerscale.laws.objective import Objective
from peerscale.laws.powers import power_problem
from peerscale.laws.results import FitStatus, Number
from peerscale.laws.solver import solve
from peerscale.laws.table import positive_columns

FORMS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "active": {"A": ("alpha",)},
    "experts": {"A": ("alpha", "chi")},
    "granularity": {"A": ("alpha", "gamma")},
    "product": {"A": ("alpha", "chi", "gamma")},
    "memory": {"A": ("alpha",), "H": ("eta", "theta")},
}
"""Exponents in the sizes A and H, the simplest form first; every form has B / D^beta and E too."""
TIE, ROUNDING = 1.1, 1e-4
"""Held-out errors within this factor, or this many nats, of the lowest are no worse."""
SIGNED = ("chi", "gamma")
"""At equal active parameters, more experts may also do harm."""
START_EXPONENTS = (0.1, 0.3, 0.7)


@dataclass(frozen=True, kw_only=True)
class PeerLaw:
    """The law for raw counts; what a form leaves out is zero. Coefficients are numbers or arrays of draws."""

    E: Number
    A: Number
    B: Number
    alpha: Number
    beta: Number
    chi: Number = 0.0
    gamma: Number = 0.0
    H: Number = 0.0
    eta: Number = 0.0
    theta: Number = 0.0

    def predict(self, params: ArrayLike, tokens: ArrayLike, experts: ArrayLike, granularity: ArrayLike) -> Number:
        """Loss at N = `params`, D = `tokens`, X = `experts`, G = `granularity`, in raw counts."""
        n, d, x, g = (np.asarray(count, float) for count in (params, tokens, experts, granularity))
        size = self.A * n**-self.alpha * x**-self.chi * g**-self.gamma
        return self.E + size + self.H * x**-self.eta * g**-self.theta + self.B * d**-self.beta


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A form and how well it extrapolates."""

    form: str
    status: FitStatus
    objective_value: float
    """Over all runs."""
    held_out: Mapping[str, float]
    """Root mean squared error of the largest tenth along each axis, from a fit of the rest."""
    error: float
    """Root mean square of those."""


@dataclass(frozen=True, kw_only=True)
class PeerFit(PeerLaw, Fit):
    """The form chosen: the simplest whose held-out error is about the lowest."""

    law: ClassVar[str] = "peer"
    form: ClassVar[type] = PeerLaw
    chosen: str
    candidates: tuple[Candidate, ...]
    """All forms, by held-out error."""


def fit_peer(
    table: pd.DataFrame,
    *,
    params: str,
    tokens: str,
    experts: str,
    granularity: str,
    loss: str,
    objective: Objective | str = Objective.HUBER_LOG,
    delta: float = 1e-3,
    **resampling: Unpack[Resampling],
) -> PeerFit:
    """Fit every form, choose one by held-out error, and report them all.

    A form's error is that of predicting the runs of the largest N D, of the most experts and of the most active
    experts, each from a fit of the others; an axis along which the runs do not differ does not count.

    Args:
        table: one row per run of a layer with experts.
        params, tokens, experts, granularity, loss: columns of N, D, X, G and the loss.
        objective, delta: as in `fit_parametric`.
        resampling: see `Resampling`; by default the runs of the largest N D are held out.

    Raises:
        UserError: a column is missing or holds anything but finite numbers above zero; too few runs to hold any out.
    """
    columns = (params, tokens, experts, granularity, loss)
    *variables, losses = positive_columns(table, *columns, law=PeerFit.law, at_least=5)
    log_n, log_d, log_x, log_g = map(np.log, variables)
    logs = {"alpha": log_n, "beta": log_d, "chi": log_x, "gamma": log_g, "eta": log_x, "theta": log_g}
    axes = {"budget": variables[0] * variables[1], "experts": variables[2], "granularity": variables[3]}
    problems, candidates = {}, []
    for form, sizes in FORMS.items():
        powers = {size: {name: logs[name] for name in names} for size, names in sizes.items()}
        problem = problems[form] = power_problem(
            {**powers, "B": {"beta": log_d}, "E": {}}, losses,
            objective=objective, delta=delta, start_exponents=START_EXPONENTS, signed=SIGNED,
        )  # fmt: skip
        point, value, status = solve(problem)
        found = {axis: predict_held_out(problem, point, largest(scale), scale) for axis, scale in axes.items()}
        held_out = {axis: one.rmse for axis, one in found.items() if one}
        error = float(np.sqrt(np.mean(np.square([*held_out.values()])))) if held_out else np.inf
        candidates.append(Candidate(form=form, status=status, objective_value=value, held_out=held_out, error=error))
    candidates.sort(key=lambda candidate: candidate.error)
    if not np.isfinite(candidates[0].error):
        raise UserError(f"{len(table)} rows are too few to choose a form of the peer law: none can be held out")
    good = [one.form for one in candidates if one.error <= TIE * candidates[0].error + ROUNDING]
    chosen = next(form for form in FORMS if form in good)
    return estimate(
        PeerFit, table, columns, problems[chosen], axes["budget"],
        chosen=chosen, candidates=tuple(candidates), **resampling,
    )  # fmt: skip
