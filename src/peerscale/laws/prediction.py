"""Predictions from stored fits: the optimum of a budget, the loss of a run, or the best learning rate."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from peerscale.laws.fitting import Bootstrap, percentile_interval
from peerscale.laws.isoflop import PowerLaw, fit_power_law
from peerscale.laws.moe import GranularLaw, RoutedLaw
from peerscale.laws.parametric import Surface
from peerscale.laws.solver import Array, FitStatus, Number
from peerscale.stats.optima import OptimumStatus
from peerscale.stats.rate_law import RateLaw

LAWS: Mapping[str, tuple[type, tuple[str, ...]]] = {
    "isoflop": (PowerLaw, ("budget",)),
    "envelope": (PowerLaw, ("budget",)),
    "parametric": (Surface, ("budget", "params", "tokens")),
    "routed": (RoutedLaw, ("params", "experts")),
    "granular": (GranularLaw, ("params", "tokens", "granularity")),
    "rates": (RateLaw, ("width", "tokens", "batch")),
}
"""By law: the class of its coefficients, and the inputs of a prediction. An optimum needs the budget, a loss all other
inputs; a rate accepts any of its inputs."""
DOUBTS = {
    FitStatus.AT_BOUND: ", a coefficient is at the end of its range",
    FitStatus.NOT_IDENTIFIABLE: ", a coefficient is uncertain by more than its own size",
}
LOWEST_LOSS = "loss at the optimum"
FAR = 10
"""Multiple of the largest budget beyond which a power law of the loss without an irreducible part causes a warning."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """The predictions of a fit for given numbers."""

    values: dict[str, tuple[float, tuple[float, float] | None]]
    """By name, each with its interval if the fit has a bootstrap; empty if too few numbers are given."""
    notes: tuple[str, ...]
    """Warnings, `warning: ...`, and missing predictions: `no optimum: <why>` or `no prediction: <why>`."""


def predict(stored: Mapping[str, Any], given: Mapping[str, float], columns: Mapping[str, Any]) -> Prediction:
    """Predict from a stored fit.

    Args:
        stored: `Fit.to_dict()`; for an isoFLOP fit the bootstrap's draws may have `loss`, (draws, budgets).
        given: numbers by name, see `LAWS`.
        columns: names of the fitted columns, such as `{"x": "params_total"}`, `include_flagged`, and for a law of rates
            `fitted`, the ranges of its variables.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: `stored` is not such a fit.
    """
    name, missing, notes = stored["law"], "", []
    if name not in LAWS:
        raise ValueError(f"unknown law {name!r}")
    form, variables = LAWS[name]
    if form is RateLaw:  # it may depend on some of the variables only
        fitted = columns.get("fitted", dict.fromkeys(variables, (0, np.inf)))
        variables = tuple(key for key in variables if key in fitted)
        for key in variables:
            low, high = fitted[key]
            if key in given and not low <= given[key] <= high:
                notes.append(f"warning: --{key} is outside the range that was fitted, {low:g} to {high:g}")
    known = {key: value for key, value in given.items() if key in variables}
    coefficients = {item.name: stored[item.name] for item in fields(form)}
    if wrong := [key for key, value in coefficients.items() if not isinstance(value, float | int | None)]:
        raise ValueError(f"{wrong[0]} is not a number")
    bootstrap = Bootstrap.from_dict(stored["bootstrap"]) if stored["bootstrap"] else None
    values, draws = {}, {}
    if None not in coefficients.values():
        values = _answers(name, form(**coefficients), known, columns)
        draws = _answers(name, bootstrap.law(form), known, columns) if bootstrap else {}
        if stored["status"] != FitStatus.CONVERGED:
            notes.append(f"warning: the fit's status is {stored['status']}{DOUBTS.get(stored['status'], '')}")
    else:
        few = "too few budgets with a usable optimum, three are needed"
        missing = few if form is PowerLaw else f"the fit's status is {stored['status']}"
    if name == "isoflop" and (budget := given.get("budget")):
        flagged = columns.get("include_flagged", False)  # the same optima as in the power law of x
        optima = stored["vertices"]
        used = [one["status"] == OptimumStatus.OK or (flagged and one["x"] is not None) for one in optima]
        budgets, losses = (np.array([one[key] for one in optima], float)[used] for key in ("budget", "loss"))
        if len(losses) > 1:
            values[LOWEST_LOSS] = _lowest_loss(budget, budgets, losses)
            if bootstrap and "loss" in bootstrap.draws:
                draws[LOWEST_LOSS] = _lowest_loss(budget, budgets, bootstrap.draws["loss"][:, used])
            if budget > FAR * budgets.max():
                far = f"warning: {budget:.4g} is far beyond the largest budget, {budgets.max():.4g}"
                notes.append(f"{far}; the {LOWEST_LOSS} is too low there, as its power law has no irreducible loss")
    if not values:
        sizes = ", ".join(f"--{key}" for key in variables if key != "budget")
        needs = ", or ".join(filter(None, ("--budget" * ("budget" in variables), sizes)))
        return Prediction(values={}, notes=(f"no prediction: {missing or f'the {name} law needs {needs}'}",))
    notes += [f"no optimum: {missing}"] * bool(missing)
    if unused := ", ".join(f"--{key}" for key in given if key not in variables):
        notes.append(f"warning: {unused} not used: the {name} law has no such variable")
    intervals = {what: percentile_interval(np.asarray(drawn)) for what, drawn in draws.items()}
    found = {what: (float(value), intervals.get(what)) for what, value in values.items()}
    return Prediction(values=found, notes=tuple(notes))


def _answers(name: str, law: Any, given: Mapping[str, float], columns: Mapping[str, Any]) -> dict[str, Number]:
    """The predictions of a law for the given numbers, by name; empty if there are too few numbers."""
    found, variables = {}, {key: given.get(key) for key in LAWS[name][1]}
    if isinstance(law, RateLaw):
        return {"best lr": law.predict(**variables)} if given or columns.get("fitted") == {} else {}
    if budget := variables.pop("budget", None):
        best = law.optimum(budget)
        if not variables:
            return {f"optimal {columns.get('x') or 'x'}": best}
        found = {f"optimal {columns.get(key) or key}": getattr(best, key) for key in ("params", "tokens")}
        found[LOWEST_LOSS] = best.loss
        for one, other in (("params", "tokens"), ("tokens", "params")):
            if (size := variables[one]) and not variables[other]:
                variables[other] = budget / (6 * size)  # from the budget, C = 6 N D
    if variables and all(variables.values()):
        found["loss"] = law.predict(*variables.values())
        if name == "routed":
            found["effective params"] = law.effective_params(*variables.values())
    return found


def _lowest_loss(budget: float, budgets: Array, losses: Array) -> Number:
    """The value at `budget` of a power law through the losses of two or more optima (..., budgets).

    It has no irreducible loss, which the optima of a few budgets do not determine.
    """
    exponent, coefficient = fit_power_law(budgets, losses)
    return coefficient * budget**exponent
