"""Fit scaling laws to any table of runs, and predict from a fit.

    .venv/bin/python analysis/fit.py parametric runs.csv --params N --tokens D --loss loss --out fit.json
    .venv/bin/python analysis/fit.py isoflop runs.csv --budget C --x N --loss loss --by method --out fit.json
    .venv/bin/python analysis/fit.py routed runs.csv --dense-params N --experts E --loss loss --out fit.json
    .venv/bin/python analysis/fit.py granular runs.csv --params N --tokens D --granularity G --loss loss --out fit.json
    .venv/bin/python analysis/fit.py peer runs.csv --params N --tokens D --experts X --granularity G --loss loss \\
        --out fit.json
    .venv/bin/python analysis/fit.py envelope curves.csv --run run --flops C --x N --loss loss --out fit.json
    .venv/bin/python analysis/fit.py rates runs.csv --lr lr --loss loss --width d --tokens D --batch B --by method \\
        --out fit.json
    .venv/bin/python analysis/fit.py predict fit.json --budget 1e21

The words after --params, --x and so on are names of columns. The folder of a study, such as results/reproduce, may
stand in place of its table of runs, or for `envelope` of its training curves; `predict` reads a study's fits.json too.
Intervals are 95 % percentile intervals of a bootstrap over runs. Every fit also says how well the smaller budgets
predict the largest; that of rates, how well the law predicts the best rates of models that it has not seen.
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
from peerscale.errors import ArgumentParser, UserError, exit_code, natural_number, positive_number
from peerscale.files import write_json
from peerscale.laws.fitting import SHOWN, Fit, HoldOut, positive_columns, require_column
from peerscale.laws.isoflop import IsoflopFit, PowerLaw
from peerscale.laws.moe import PeerFit
from peerscale.laws.parametric import Surface
from peerscale.laws.prediction import LAWS
from peerscale.laws.solver import FitStatus, Objective
from peerscale.runs import read_runs
from peerscale.runs.table import CURVES
from peerscale.runs.table import read_table as read_csv

PROGRAM = ".venv/bin/python analysis/fit.py"
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
COLUMNS = {
    "params": "the number of parameters",
    "dense-params": "the number of parameters that one token uses",
    "tokens": "the training tokens",
    "flops": "the training FLOPs; C = 6 N D then gives the tokens",
    "budget": "the compute budget, equal for all runs of a budget",
    "x": "the size whose optimum is sought, such as parameters, tokens or FLOPs per token",
    "run": "the run's name",
    "experts": "the number of experts",
    "granularity": "the granularity, or the experts that one token uses",
    "loss": "the loss",
}
OPTIONS = ("objective", "delta", "include_flagged", "within")
RESAMPLING = ("bootstrap", "seed", "cluster", "budget", "hold_out")
PREDICT_FROM = ("budget", "params", "tokens", "experts", "granularity", "width", "batch")
RATE_COLUMNS = {
    "lr": "the peak learning rate as it was used",
    "loss": "the loss",
    "width": "the model's width",
    "tokens": "the training tokens",
    "batch": "the batch, in tokens or sequences",
}
MEANINGS = {
    "a": "the optimal N grows as C^a",
    "b": "the optimal D grows as C^b",
    "exponent": "the optimum grows as the budget to this power",
    "coefficient": "the optimum of a budget of 1 FLOP",
}
"""Of coefficients that no formula shows."""
NEEDS, NONE = "law needs", "none"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    given = vars(arguments)
    if other := {"predict": predict, "rates": fit_learning_rates}.get(arguments.command):
        other(arguments)
        return 0
    law: Callable[..., Fit] = COMMANDS[arguments.command][0]
    columns = {name: given[name] for name in COMMANDS[arguments.command][1].replace("-", "_").split()}
    table = read_table(arguments.table, arguments.where, curves=law is laws.fit_envelope)
    if law is laws.fit_isoflop:
        table = one_budget_each(table, arguments.budget, arguments.tolerance)
    described = columns | {name: given[name] for name in OPTIONS if name in given}
    options = {name: given[name] for name in RESAMPLING if name in given} | described
    stored, text = fit_groups(table, lambda rows: law(rows, **options), given.get("by"), given.get("x", ""))
    stored["source"] = {"table": arguments.table.name, "where": arguments.where, **described}
    write_json(arguments.out, stored)
    print(f"{text}\n-> {arguments.out}")
    return 0


def parser() -> argparse.ArgumentParser:
    top = ArgumentParser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)
    for name, (_, columns, bootstrap, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        add = command.add_argument
        add("table", type=Path, metavar="TABLE", help="CSV file, one row per run; or a study's folder")
        for column in columns.split():
            optional = column in ("tokens", "flops") and name == "parametric"
            add(f"--{column}", metavar="COL", required=not optional, help=f"column of {COLUMNS[column]}")
        add("--where", metavar="EXPR", help="rows to fit, as a pandas query: \"method == 'dense'\"")
        add("--bootstrap", type=natural_number, default=bootstrap, metavar="N", help=f"resamples ({bootstrap})")
        add("--seed", type=natural_number, default=0, help="seed of the resampling (0)", metavar="N")
        if name != "envelope":
            add("--cluster", metavar="COL", help="column whose equal values are resampled together")
        if name in ("isoflop", "envelope"):
            add("--by", metavar="COL", help="one fit per value of this column")
        else:
            add("--budget", metavar="COL", help="column by which the largest runs are held out")
            add("--hold-out", type=positive_number, metavar="NUMBER", help="hold out the runs from this budget on")
        if name in ("parametric", "peer"):
            minimised, default = "what is minimised (huber-log)", Objective.HUBER_LOG
            add("--objective", choices=list(Objective), default=default, help=minimised)
            add("--delta", type=positive_number, default=1e-3, metavar="NUMBER", help="where Huber turns linear (1e-3)")
        if name == "isoflop":
            add("--include-flagged", action="store_true", help="let the power law use flagged minima too")
            far = "leave sizes out whose loss is more than this share above the budget's lowest, such as .04; keep five"
            add("--within", type=positive_number, metavar="SHARE", help=far)
            close = "budgets this close to their neighbour are one, such as .1"
            add("--tolerance", type=positive_number, metavar="SHARE", help=close)
        add("--out", type=Path, required=True, metavar="JSON", help="where the fit goes")
    text = "lr = m (width / width_0)^-a (tokens / tokens_0)^-b (batch / batch_0)^c"
    add = commands.add_parser("rates", help=text, description=text).add_argument
    add("table", type=Path, metavar="TABLE", help="CSV file, one row per run; or a study's folder")
    for column, meaning in RATE_COLUMNS.items():
        add(f"--{column}", metavar="COL", required=column in ("lr", "loss"), help=f"column of {meaning}")
    add("--by", metavar="COL", help="column of the method, which has an m of its own")
    add(
        "--curve", metavar="COL", nargs="*", default=[], help="further columns in which the runs of one curve are equal"
    )
    add("--where", metavar="EXPR", help="rows to fit, as a pandas query")
    add("--hold-out", metavar="EXPR", help="rows to judge the law by; without it each model is left out in turn")
    add("--out", type=Path, required=True, metavar="JSON", help="where the fit goes")
    text = "optimum of a budget, loss of a run, or best rate, from a fit"
    add = commands.add_parser("predict", help=text, description=text).add_argument
    add("file", type=Path, metavar="JSON", help="a fit, or fits by name such as a study's fits.json")
    add("--budget", type=positive_number, metavar="NUMBER", help="training FLOPs: what is optimal?")
    for name in PREDICT_FROM[1:]:
        add(_option(name), type=positive_number, metavar="NUMBER", help="of the run whose loss is wanted")
    return top


def read_table(path: Path, where: str | None, *, curves: bool = False) -> pd.DataFrame:
    """The rows that satisfy the query: a CSV's, labelled by their line, or a study's runs or training curves."""
    if path.is_dir():
        table = read_runs(path)
        if curves:  # with the columns of their runs; those of a run that are also a step's end in `_final`
            table = read_csv(path / "curves.csv", CURVES).merge(table, on="cell", suffixes=("", "_final"))
    else:
        table = read_csv(path, skipinitialspace=True)
        table.index = pd.RangeIndex(2, len(table) + 2, name="line")
    if table.empty:
        raise UserError(f"the table {path} has no rows")
    if where is None:
        return table
    chosen = table[rows_that("--where", where, table)]
    if chosen.empty:
        raise UserError(f"--where {where!r} leaves none of the {len(table)} rows")
    return chosen


def rows_that(option: str, query: str, table: pd.DataFrame) -> pd.Series:
    """Which rows satisfy the query."""
    try:
        rows = table.eval(query, local_dict={}, global_dict={})  # a query sees columns only
    except Exception as error:  # the query language raises whatever Python does
        there = ", ".join(map(str, table.columns))
        raise UserError(f"{option} {query!r}: {_first_line(error)}; columns: {there}") from None
    if not (isinstance(rows, pd.Series) and pd.api.types.is_bool_dtype(rows)):
        raise UserError(f"{option} {query!r} is not a condition on rows, such as \"method == 'dense'\"")
    return rows.fillna(False)


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


def fit_groups(
    table: pd.DataFrame, fit: Callable[[pd.DataFrame], Any], by: str | None, x: str
) -> tuple[dict[str, Any], str]:
    """The fit, or with `by` one per value under `groups`, and its summary; refuses a table without any parabola."""
    if by is not None:
        require_column(table, by)
    named = [("", table)] if by is None else table.groupby(by, sort=False, dropna=False)
    groups = {str(name): fit(rows) for name, rows in named}
    optima = [optimum for group in groups.values() if isinstance(group, IsoflopFit) for optimum in group.vertices]
    if optima and not any(np.isfinite(optimum.curvature) for optimum in optima):
        raise UserError(
            "no budget has runs of three different sizes, the least for a parabola (five are wanted); measured FLOPs "
            "are grouped into budgets by --tolerance .1"
        )
    first = next(iter(groups.values()))
    if by is None:
        return first.to_dict(), summary(first, x)
    stored = {
        "law": first.law,
        "n": len(table),
        "status": str(min((group.status for group in groups.values()), key=lambda s: s is FitStatus.CONVERGED)),
        "objective_name": first.objective_name,
        "objective_value": sum(group.objective_value for group in groups.values()),
        "ci": {},
        "by": by,
        "groups": {name: group.to_dict() for name, group in groups.items()},
    }
    return stored, "\n".join(f"{by} = {name}\n{summary(group, x)}" for name, group in groups.items())


def summary(fit: Any, x: str) -> str:
    """A fit in a few lines: coefficients and minima of `x` with intervals and flags, held-out error, every warning."""
    lines = [f"{fit.law}: {fit.n} runs, {fit.status}, {fit.objective_name} {fit.objective_value:.8g}"]
    for optimum in fit.vertices if isinstance(fit, IsoflopFit) else ():
        size, loss = _number(optimum.x, optimum.x_interval), _number(optimum.loss, optimum.loss_interval)
        lines.append(f"  budget {optimum.budget:<8.4g} {x} {size}  loss {loss}  n {optimum.n}  {optimum.status}")
    for form in fit.candidates if isinstance(fit, PeerFit) else ():
        errors = ", ".join(f"{axis} {error:.4g}" for axis, error in form.held_out.items())
        lines.append(f"  form {form.form:<11} held-out error {form.error:.4g} ({errors})  {form.status}")
    meanings = MEANINGS if isinstance(fit, Surface | PowerLaw) else {}
    for name in (*(item.name for item in fields(fit.form)), *fit.derived):
        value, meaning = _number(getattr(fit, name), fit.ci.get(name)), meanings.get(name, "")
        lines.append(f"  {name:<12} {value:<32} {meaning * (value != NONE)}".rstrip())
    if isinstance(fit, IsoflopFit):
        lines.append(f"  exponent of approach 3 on the same runs {_number(fit.surface_exponent, None)}")
    if fit.bootstrap is not None:
        drawn = fit.bootstrap
        lines.append(f"  {drawn.resamples} resamples, {drawn.failed} failed, {drawn.at_bound} at a bound")
    if fit.hold_out is not None:
        lines.append(held_out(fit.hold_out, x))
    return "\n".join([*lines, *(f"  warning: {warning}" for warning in fit.warnings)])


def fit_learning_rates(arguments: argparse.Namespace) -> None:
    """Fit the law of the best rate, write it, and print it with its intervals and held-out error."""
    table, given = read_table(arguments.table, arguments.where), vars(arguments)
    held = None if arguments.hold_out is None else rows_that("--hold-out", arguments.hold_out, table)
    if held is not None and not held.any():
        raise UserError(f"--hold-out {arguments.hold_out!r} holds out none of the {len(table)} rows")
    asked = {name: given[name] for name in (*RATE_COLUMNS, "by")}
    fit = laws.fit_rates(table, **asked, curve=arguments.curve, hold_out=held)
    described = asked | {name: given[name] for name in ("where", "hold_out")}
    write_json(arguments.out, fit.to_dict() | {"source": {"table": arguments.table.name, **described}})
    lines = [
        f"rates: {fit.n} runs on {fit.n_curves} curves, which scatter by {fit.scatter:.2g} about parabolas in ln lr of "
        f"curvature {fit.curvature:.3g} +- {fit.curvature_se:.1g}"
    ]
    for method, law in fit.laws.items():
        at = ", ".join(f"{name} {getattr(law, f'{name}_0'):g}" for name in fit.fitted)
        where = f"at {at}" * bool(at)
        lines.append(f"  m of {method:<20} {_number(law.m, fit.ci[method]['m']):<32} {where}".rstrip())
    law, intervals = next(iter(fit.laws.values())), next(iter(fit.ci.values()))
    lines += [f"  {name:<25} {_number(getattr(law, name), ci)}" for name, ci in intervals.items() if name != "m"]
    if test := fit.equal_exponents:
        lines.append(f"  one set of exponents for all: F{test['df']} = {test['f']:.2f}, p = {test['p']:.2g}")
    for one in fit.held_out if held is not None else ():
        lines.append(f"  held out {one.name}: best {one.best:.3g}, predicted {one.predicted:.3g}, costs {one.cost:.2g}")
    if fit.held_out:
        off = math.exp(fit.held_out_error)
        lines.append(
            f"  {len(fit.held_out)} held-out curves: rates off by x {off:.3g}, which costs {fit.held_out_cost:.2g}"
        )
    print("\n".join([*lines, *(f"  warning: {warning}" for warning in fit.warnings), f"-> {arguments.out}"]))


def held_out(found: HoldOut, x: str) -> str:
    """The largest budget, observed and as predicted from the others."""
    predicted, observed = _number(found.predicted, found.interval), _number(found.observed, found.observed_interval)
    what, rmse = ("run", f", RMSE {found.rmse:.4g}") if found.quantity == "loss" else ("budget", "")
    quantity = x if found.quantity == "x" else found.quantity
    return (
        f"  held out: {found.n} {what}{'s' * (found.n > 1)} from {found.budget:.4g}: {quantity} {observed}, "
        f"predicted {predicted}{rmse}, mean error {found.mape:.3g} %"
    )


def predict(arguments: argparse.Namespace) -> None:
    """Print what the given numbers ask of each fit; what holds for several fits is said once, at the end."""
    asked = {name: getattr(arguments, name) for name in PREDICT_FROM if getattr(arguments, name)}
    lines, notes = [], dict[tuple[str, str], list[str]]()
    try:
        fits = stored_fits(arguments.file)
        for name, stored, columns in fits:
            found = laws.predict(stored, asked, columns)
            said = [("warning", warning) for warning in found.warnings if found.values]
            if found.missing or not found.values:
                why = found.missing or f"the {stored['law']} {NEEDS} {needs(stored['law'])}"
                said.append(("no optimum" if found.values else "no prediction", why))
            if found.unused and found.values:
                unused = ", ".join(map(_option, found.unused))
                said.append(("warning", f"{unused} not used: the {stored['law']} law has no such variable"))
            for note in said:
                notes.setdefault(note, []).append(name)
            width = max(map(len, found.values), default=0)
            lines += [name] * bool(found.values)
            lines += [f"  {what:<{width}}  {_number(*value)}" for what, value in found.values.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{arguments.file} holds no fit of this program: {_first_line(error)}") from None
    if not lines and all(NEEDS in why for _, why in notes):
        raise UserError(f"no prediction: {'; '.join(why for _, why in notes)}")
    for (what, why), names in notes.items():
        where = which = ""
        if len(fits) > 1:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            where, which = f" from {len(names)} of {len(fits)} fits", f" ({', '.join(names[:SHOWN])}{more})"
        lines.append(f"{what}{where}: {why}{which}")
    print("\n".join(lines))


def stored_fits(path: Path) -> list[tuple[str, dict[str, Any], Mapping[str, Any]]]:
    """Name, fit and names of the columns of every fit in a file: one fit, one per group, or fits by name."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    fits = {"": stored} if "law" in stored else dict(stored).get("laws", stored)
    if not fits:
        raise ValueError("it is empty")
    return [
        (f"{name} {group}".strip() or part["law"], part, fit.get("source", fit))
        for name, fit in fits.items()
        for group, part in fit.get("groups", {"": fit}).items()
    ]


def needs(law: str) -> str:
    """The options that a prediction of a law takes."""
    sizes = [_option(name) for name in LAWS[law][1] if name != "budget"]
    options = ["--budget"] * ("budget" in LAWS[law][1]) + [", ".join(sizes)] * bool(sizes)
    return ", or ".join(options)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _number(value: Any, interval: tuple[float, float] | None) -> str:
    if value is None or not np.isfinite(value):
        return NONE
    shown = f" [{interval[0]:.4g}, {interval[1]:.4g}]" if interval and np.isfinite(interval).all() else ""
    return f"{float(value):.6g}{shown}"


def _first_line(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"no {error}"
    lines = str(getattr(error, "strerror", None) or error).splitlines()
    return lines[0] if lines else type(error).__name__


if __name__ == "__main__":
    sys.exit(exit_code(main))
