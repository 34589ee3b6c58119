"""Fit scaling laws to any table of runs, and predict from a fit.

    python analysis/fit.py parametric runs.csv --params N --tokens D --loss loss --out fit.json
    python analysis/fit.py isoflop    runs.csv --budget budget --x N --loss loss --by method --out fit.json
    python analysis/fit.py routed     runs.csv --dense-params N --experts E --loss loss --out fit.json
    python analysis/fit.py granular   runs.csv --params N --tokens D --granularity G --loss loss --out fit.json
    python analysis/fit.py peer       runs.csv --params N --tokens D --experts X --granularity G --loss L --out fit.json
    python analysis/fit.py envelope   curves.csv --run run --flops C --x N --loss loss --out fit.json
    python analysis/fit.py predict    fit.json --budget 1e21

A folder of a study stands for its table of runs, or for its training curves. Intervals are 95 % percentile intervals
of a bootstrap over runs. Beside every fit stands how well the smaller budgets predict the largest.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from peerscale import laws
from peerscale.errors import ArgumentParser, UserError, exit_code
from peerscale.files import write_json
from peerscale.laws.bootstrap import Bootstrap, percentile_interval
from peerscale.laws.fit import Fit
from peerscale.laws.holdout import HoldOut
from peerscale.laws.isoflop import IsoflopFit
from peerscale.laws.objective import Objective
from peerscale.laws.peer import PeerFit
from peerscale.laws.results import FitStatus
from peerscale.laws.table import positive_columns, require_column
from peerscale.runs import read_runs
from peerscale.runs.table import CURVES, METRICS, curves_table
from peerscale.runs.table import read_table as read_csv

COMMANDS = {
    "parametric": (laws.fit_parametric, "params tokens flops loss", 4000, "L = E + A / N^alpha + B / D^beta"),
    "isoflop": (laws.fit_isoflop, "budget x loss", 4000, "a parabola per budget, a power law through the minima"),
    "envelope": (laws.fit_envelope, "run flops x loss", 1000, "the lowest of all training curves, and its power law"),
    "routed": (laws.fit_routed, "dense-params experts loss", 1000, "log10 L = a n + b e + c n e + d"),
    "granular": (
        laws.fit_granular, "params tokens granularity loss", 1000, "L = c + (g / G^gamma + a) / N^alpha + b / D^beta"
    ),
    "peer": (
        laws.fit_peer, "params tokens experts granularity loss", 1000,
        "the form of a law in N, D, experts and active experts that predicts best",
    ),
}  # fmt: skip
"""Function, columns, resamples and help of each command that fits."""
OPTIONS = ("objective", "delta", "include_flagged", "within")
RESAMPLING = ("bootstrap", "seed", "cluster", "budget", "hold_out")
FORMS = {kind.law: kind.form for kind in Fit.__subclasses__()}
ARGUMENTS = {
    "isoflop": ("budget",),
    "envelope": ("budget",),
    "parametric": ("budget", "params", "tokens"),
    "data_constrained": ("budget", "params", "tokens", "unique_tokens"),
    "routed": ("params", "experts"),
    "granular": ("params", "tokens", "granularity"),
    "peer": ("params", "tokens", "experts", "granularity"),
}
"""What a prediction of each law takes: all of it, but for the laws of a budget."""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    given = vars(arguments)
    if arguments.command == "predict":
        predict(arguments)
        return 0
    law: Callable[..., Fit] = COMMANDS[arguments.command][0]
    columns = {name: given[name] for name in COMMANDS[arguments.command][1].replace("-", "_").split()}
    table = read_table(arguments.table, arguments.where, curves=law is laws.fit_envelope)
    if given.get("unique_tokens"):
        if arguments.flops or not arguments.tokens:
            raise UserError("--unique-tokens goes with --tokens, not with --flops")
        law, columns["unique_tokens"] = laws.fit_data_constrained, arguments.unique_tokens
        del columns["flops"]
    if law is laws.fit_isoflop:
        table = one_budget_each(table, arguments.budget, arguments.tolerance)
    described = columns | {name: given[name] for name in OPTIONS if name in given}
    options = {name: given[name] for name in RESAMPLING if name in given} | described
    stored, text = fit_groups(table, lambda rows: law(rows, **options), given.get("by"))
    stored["source"] = {"table": arguments.table.name, "where": arguments.where, **described}
    write_fit(arguments.out, stored)
    print(f"{text}\n-> {arguments.out}")
    return 0


def parser() -> argparse.ArgumentParser:
    top = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)
    for name, (_, columns, bootstrap, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        add = command.add_argument
        add("table", type=Path, metavar="TABLE", help="CSV file, one row per run; or a study's folder")
        for column in columns.split():
            optional = column in ("tokens", "flops") and name == "parametric"
            add(f"--{column}", metavar="COL", required=not optional, help="its column")
        add("--where", metavar="EXPR", help="rows to fit, as a pandas query: \"method == 'dense'\"")
        add("--bootstrap", type=count, default=bootstrap, metavar="N", help=f"resamples ({bootstrap})")
        add("--seed", type=count, default=0, help="of the resampling (0)")
        if name != "envelope":
            add("--cluster", metavar="COL", help="column whose equal values are resampled together")
        if name in ("isoflop", "envelope"):
            add("--by", metavar="COL", help="one fit per value of this column")
        else:
            add("--budget", metavar="COL", help="the largest of this column are held out")
            add("--hold-out", type=positive, metavar="NUMBER", help="from this budget on")
        if name in ("parametric", "peer"):
            add("--objective", choices=list(Objective), default=Objective.HUBER_LOG)
            add("--delta", type=positive, default=1e-3, help="where Huber turns linear (1e-3)")
        if name == "parametric":
            add("--unique-tokens", metavar="COL", help="different tokens: fits how much repeated ones are worth")
        if name == "isoflop":
            add("--include-flagged", action="store_true", help="let the power law use flagged minima too")
            far = "leave sizes out whose loss is more than this share above the budget's lowest, such as .04; keep five"
            add("--within", type=positive, metavar="SHARE", help=far)
            close = "budgets this close to their neighbour are one, such as .1"
            add("--tolerance", type=positive, metavar="SHARE", help=close)
        add("--out", type=Path, required=True, metavar="JSON", help="where the fit goes")
    prediction = commands.add_parser("predict", help="optimum of a budget, or loss of a run, from a fit")
    prediction.add_argument("file", type=Path, metavar="JSON", help="a fit, or fits by name")
    for name in ("budget", "params", "tokens", "unique-tokens", "experts", "granularity"):
        prediction.add_argument(f"--{name}", type=positive, metavar="NUMBER")
    return top


def count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number above 0")
    return value


def read_table(path: Path, where: str | None, *, curves: bool = False) -> pd.DataFrame:
    """The rows that satisfy the query: a CSV's, labelled by their line, or a study's runs or training curves."""
    if path.is_dir():
        table = study_curves(path) if curves else read_runs(path)
    else:
        table = read_csv(path, skipinitialspace=True)
        table.index = pd.RangeIndex(2, len(table) + 2, name="line")
    if table.empty:
        raise UserError(f"the table {path} has no rows")
    if where is None:
        return table
    try:
        rows = table.eval(where, local_dict={}, global_dict={})  # a query sees columns only
    except Exception as error:  # the query language raises whatever Python does
        there = ", ".join(map(str, table.columns))
        raise UserError(f"--where {where!r}: {_first_line(error)}; columns: {there}") from None
    if not (isinstance(rows, pd.Series) and pd.api.types.is_bool_dtype(rows)):
        raise UserError(f"--where {where!r} is not a condition on rows, such as \"method == 'dense'\"")
    chosen = table[rows.fillna(False)]
    if chosen.empty:
        raise UserError(f"--where {where!r} leaves none of the {len(table)} rows")
    return chosen


def study_curves(folder: Path) -> pd.DataFrame:
    """Training curves with the columns of their runs; those of a run that are also a step's end in `_final`."""
    thinned = folder / "curves.csv"
    cells = sorted(path.parent for path in folder.glob(f"*/{METRICS}"))
    curves = read_csv(thinned, CURVES) if thinned.is_file() else curves_table(cells, points=1000)
    return curves.merge(read_runs(folder), on="cell", suffixes=("", "_final"))


def one_budget_each(table: pd.DataFrame, budget: str, tolerance: float | None) -> pd.DataFrame:
    """The table with budgets that differ from the next by less than the tolerance replaced by their geometric mean."""
    (budgets,) = positive_columns(table, budget, law=IsoflopFit.law, at_least=1)
    if tolerance:
        steps = np.sort(np.log(budgets))
        starts = steps[1:][np.diff(steps) > np.log1p(tolerance)]
        group = np.searchsorted(starts, np.log(budgets), side="right")
        budgets = np.exp(np.bincount(group, np.log(budgets)) / np.bincount(group))[group]
        table = table.assign(**{budget: budgets.tolist()})
    if np.ptp(budgets) == 0:
        raise UserError(f"column {budget!r} holds one budget, {budgets[0]:g}: a power law needs three")
    return table


def fit_groups(table: pd.DataFrame, fit: Callable[[pd.DataFrame], Any], by: str | None) -> tuple[dict[str, Any], str]:
    """The fit, or with `by` one per value under `groups`, and its summary; refuses a table without any parabola."""
    if by is not None:
        require_column(table, by)
    named = [("", table)] if by is None else table.groupby(by, sort=False, dropna=False)
    groups = {str(name): fit(rows) for name, rows in named}
    vertices = [vertex for group in groups.values() if isinstance(group, IsoflopFit) for vertex in group.vertices]
    if vertices and not any(np.isfinite(vertex.curvature) for vertex in vertices):
        raise UserError(
            "no budget has runs of three different sizes, the least for a parabola (five are wanted); measured FLOPs "
            "are grouped into budgets by --tolerance .1"
        )
    first = next(iter(groups.values()))
    if by is None:
        return first.to_dict(), summary(first)
    statuses = [group.status for group in groups.values() if group.status is not FitStatus.CONVERGED]
    stored = {
        "law": first.law,
        "n": len(table),
        "status": str((statuses or [FitStatus.CONVERGED])[0]),
        "objective_name": first.objective_name,
        "objective_value": sum(group.objective_value for group in groups.values()),
        "ci": {},
        "by": by,
        "groups": {name: group.to_dict() for name, group in groups.items()},
    }
    return stored, "\n".join(f"{by} = {name}\n{summary(group)}" for name, group in groups.items())


def summary(fit: Any) -> str:
    """A fit in a few lines: coefficients and minima with intervals and flags, the held-out error, every warning."""
    lines = [f"{fit.law}: {fit.n} runs, {fit.status}, {fit.objective_name} {fit.objective_value:.8g}"]
    for vertex in fit.vertices if isinstance(fit, IsoflopFit) else ():
        x, loss = _number(vertex.x, vertex.x_interval), _number(vertex.loss, vertex.loss_interval)
        lines.append(f"  budget {vertex.budget:<8.4g} x {x}  loss {loss}  n {vertex.n}  {vertex.status}")
    for form in fit.candidates if isinstance(fit, PeerFit) else ():
        errors = ", ".join(f"{axis} {error:.4g}" for axis, error in form.held_out.items())
        lines.append(f"  form {form.form:<11} held-out error {form.error:.4g} ({errors})  {form.status}")
    names = [*(item.name for item in fields(fit.form)), *fit.derived]
    lines += [f"  {name:<12} {_number(getattr(fit, name), fit.ci.get(name))}" for name in names]
    if isinstance(fit, IsoflopFit):
        lines.append(f"  exponent of approach 3 on the same runs {_number(fit.surface_exponent, None)}")
    if fit.bootstrap is not None:
        drawn = fit.bootstrap
        lines.append(f"  {drawn.resamples} resamples, {drawn.failed} failed, {drawn.at_bound} at a bound")
    if fit.hold_out is not None:
        lines.append(held_out(fit.hold_out))
    return "\n".join([*lines, *(f"  warning: {warning}" for warning in fit.warnings)])


def held_out(found: HoldOut) -> str:
    """The largest budget, observed and as predicted from the others."""
    predicted, observed = _number(found.predicted, found.interval), _number(found.observed, found.observed_interval)
    what, rmse = ("run", f", RMSE {found.rmse:.4g}") if found.quantity == "loss" else ("budget", "")
    return (
        f"  held out: {found.n} {what}{'s' * (found.n > 1)} from {found.budget:.4g}: {found.quantity} {observed}, "
        f"predicted {predicted}{rmse}, mean error {found.mape:.3g} %"
    )


def write_fit(path: Path, stored: Mapping[str, Any]) -> None:
    try:
        write_json(path, stored)
    except (PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError) as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def predict(arguments: argparse.Namespace) -> None:
    try:
        stored = json.loads(arguments.file.read_text(encoding="utf-8"))
        fits = {"": stored} if "law" in stored else stored
        if not fits:
            raise UserError(f"{arguments.file} holds no fit")
        for name, fit in fits.items():
            for group, part in fit.get("groups", {"": fit}).items():
                print("\n".join([f"{name} {group}".strip() or part["law"], *predictions(part, arguments)]))
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {arguments.file}: {_first_line(error)}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{arguments.file} is no fit of this program: {_first_line(error)}") from None


def predictions(stored: Mapping[str, Any], given: argparse.Namespace) -> list[str]:
    """A line per answer of a stored fit, with its interval where the fit has a bootstrap."""
    if stored["law"] not in FORMS:
        raise ValueError(f"unknown law {stored['law']!r}")
    form = FORMS[stored["law"]]
    coefficients = {item.name: stored[item.name] for item in fields(form)}
    if wrong := [name for name, value in coefficients.items() if not isinstance(value, float | int | None)]:
        raise ValueError(f"{wrong[0]} is no number")
    if None in coefficients.values():
        return [f"  no prediction: the fit's status is {stored['status']}"]
    found = answers(stored["law"], form(**coefficients), given)
    drawn: dict[str, tuple[float, float]] = {}
    if stored["bootstrap"]:
        bootstrap = Bootstrap.from_dict(stored["bootstrap"])
        draws = answers(stored["law"], bootstrap.law(form), given)
        drawn = {name: percentile_interval(values) for name, values in draws.items()}
    lines = [f"  {name:<16} {_number(value, drawn.get(name))}" for name, value in found.items()]
    names = {name for arguments in ARGUMENTS.values() for name in arguments}
    unused = [_option(name) for name in sorted(names - {*ARGUMENTS[stored["law"]]}) if getattr(given, name)]
    if unused:
        lines.append(f"  warning: {', '.join(unused)} says nothing to a law of this kind")
    if stored["status"] != FitStatus.CONVERGED:
        lines.append(f"  warning: the fit's status is {stored['status']}")
    return lines


def answers(name: str, law: Any, given: argparse.Namespace) -> dict[str, Any]:
    """What the numbers given on the command line ask of a law, by name."""
    found, values = {}, {item: getattr(given, item) for item in ARGUMENTS[name]}
    budget, unique = (values.pop(item, None) for item in ("budget", "unique_tokens"))
    if budget:
        best = law.optimum(budget)
        if not values:
            return {"optimal x": best}
        found = {"optimal params": best.params, "optimal tokens": best.tokens, "optimal loss": best.loss}
        for one, other in (("params", "tokens"), ("tokens", "params")):
            if values[one] and not values[other]:
                values[other] = budget / (6 * values[one])  # of the budget, C = 6 N D
    if values and all(values.values()):
        found["loss"] = law.predict(*values.values(), *([unique] if unique else []))
        if name == "routed":
            found["effective params"] = law.effective_params(*values.values())
    if not found:
        needs = (["--budget"] if "budget" in ARGUMENTS[name] else []) + [", ".join(map(_option, values))]
        raise UserError(f"a prediction of the {name} law needs {', or '.join(filter(None, needs))}")
    return found


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _number(value: Any, interval: tuple[float, float] | None) -> str:
    if value is None or not np.isfinite(value):
        return "none"
    shown = f" [{interval[0]:.4g}, {interval[1]:.4g}]" if interval and np.isfinite(interval).all() else ""
    return f"{float(value):.6g}{shown}"


def _first_line(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"no {error}"
    lines = str(getattr(error, "strerror", None) or error).splitlines()
    return lines[0] if lines else type(error).__name__


if __name__ == "__main__":
    sys.exit(exit_code(main))
