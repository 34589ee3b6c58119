"""Fit scaling laws to any table of runs, and predict from a fit.

    python analysis/fit.py parametric runs.csv --params N --tokens D --loss loss --out fit.json
    python analysis/fit.py isoflop    runs.csv --budget budget --x N --loss loss --by method --out fit.json
    python analysis/fit.py routed     runs.csv --dense-params N --experts E --loss loss --out fit.json
    python analysis/fit.py granular   runs.csv --params N --tokens D --granularity G --loss loss --out fit.json
    python analysis/fit.py predict    fit.json --budget 1e21

Intervals are 95 % percentile intervals of a bootstrap over runs.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from peerscale.errors import UserError, exit_code
from peerscale.files import write_text
from peerscale.laws import fit_data_constrained, fit_granular, fit_isoflop, fit_parametric, fit_routed
from peerscale.laws.bootstrap import Bootstrap
from peerscale.laws.data_constrained import DataConstrainedFit
from peerscale.laws.fit import Fit
from peerscale.laws.granular import GranularFit
from peerscale.laws.isoflop import IsoflopFit
from peerscale.laws.objective import Objective
from peerscale.laws.parametric import ParametricFit
from peerscale.laws.results import FitStatus
from peerscale.laws.routed import RoutedFit
from peerscale.laws.table import require_column

NEEDS = {
    "isoflop": "--budget",
    "parametric": "--budget, or --params and --tokens",
    "data_constrained": "--budget, or --params, --tokens and --unique-tokens",
    "routed": "--params and --experts",
    "granular": "--params, --tokens and --granularity",
}
FORMS = {fit.law: fit.form for fit in (ParametricFit, DataConstrainedFit, IsoflopFit, RoutedFit, GranularFit)}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    if arguments.command == "predict":
        predict(arguments)
        return 0
    table = read_table(arguments.table, arguments.where)
    law, columns = arguments.fit, {name: getattr(arguments, name) for name in arguments.columns}
    options = {name: getattr(arguments, name) for name in arguments.options}
    if arguments.command == "parametric" and arguments.unique_tokens:
        if arguments.flops or not arguments.tokens:
            raise UserError("--unique-tokens goes with --tokens, not with --flops")
        law, columns["unique_tokens"] = fit_data_constrained, arguments.unique_tokens
        del columns["flops"]
    resampling = {name: getattr(arguments, name) for name in ("bootstrap", "seed", "cluster")}

    def fit(rows: pd.DataFrame) -> Fit:
        return law(rows, **columns, **options, **resampling)

    if arguments.command != "isoflop":
        result = fit(table)
        stored, text = result.to_dict(), summary(result)
    else:
        stored, text = fit_isoflops(table, fit, arguments.budget, arguments.by)
    stored["source"] = {"table": arguments.table.name, "where": arguments.where, **columns, **options}
    write_json(arguments.out, stored)
    print(f"{text}\n-> {arguments.out}")
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)

    def add(name: str, fit: Callable[..., Fit], columns: str, help: str, bootstrap: int) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help)
        command.set_defaults(fit=fit, columns=columns.replace("-", "_").split(), options=())
        command.add_argument("table", type=Path, metavar="TABLE", help="CSV file, one row per run")
        for column in columns.split():
            optional = column in ("tokens", "flops") and name == "parametric"
            command.add_argument(f"--{column}", metavar="COL", required=not optional, help="its column")
        command.add_argument("--where", metavar="EXPR", help="rows to fit, as a pandas query: \"method == 'dense'\"")
        command.add_argument("--bootstrap", type=count, default=bootstrap, metavar="N", help=f"resamples ({bootstrap})")
        command.add_argument("--seed", type=count, default=0, help="of the resampling (0)")
        command.add_argument("--cluster", metavar="COL", help="column whose equal values are resampled together")
        command.add_argument("--out", type=Path, required=True, metavar="JSON", help="where the fit goes")
        return command

    surface = add("parametric", fit_parametric, "params tokens flops loss", "L = E + A / N^alpha + B / D^beta", 4000)
    surface.add_argument("--objective", choices=list(Objective), default=Objective.HUBER_LOG)
    surface.add_argument("--delta", type=positive, default=1e-3, help="where Huber turns linear (1e-3)")
    surface.add_argument(
        "--unique-tokens", metavar="COL", help="different tokens: fits how much repeated ones are worth"
    )
    surface.set_defaults(options=("objective", "delta"))
    isoflop = add(
        "isoflop", fit_isoflop, "budget x loss", "a parabola per budget, a power law through the minima", 4000
    )
    isoflop.add_argument("--by", metavar="COL", help="one fit per value of this column")
    isoflop.add_argument("--include-flagged", action="store_true", help="let the power law use flagged minima too")
    isoflop.set_defaults(options=("include_flagged",))
    add("routed", fit_routed, "dense-params experts loss", "log10 L = a n + b e + c n e + d", 1000)
    columns = "params tokens granularity loss"
    add("granular", fit_granular, columns, "L = c + (g / G^gamma + a) / N^alpha + b / D^beta", 1000)
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


def read_table(path: Path, where: str | None) -> pd.DataFrame:
    """A CSV's rows that satisfy the query, labelled by their line in the file."""
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
        raise UserError(f"cannot read the table {path}: {_first_line(error)}") from None
    table.index = pd.RangeIndex(2, len(table) + 2, name="line")
    if where is None:
        return table
    try:
        rows = table.eval(where)
    except Exception as error:  # the query language raises whatever Python does
        there = ", ".join(map(str, table.columns))
        raise UserError(f"--where {where!r}: {_first_line(error)}; columns: {there}") from None
    if not (isinstance(rows, pd.Series) and pd.api.types.is_bool_dtype(rows)):
        raise UserError(f"--where {where!r} is not a condition on rows, such as \"method == 'dense'\"")
    chosen = table[rows.fillna(False)]
    if chosen.empty:
        raise UserError(f"--where {where!r} leaves none of the {len(table)} rows")
    return chosen


def fit_isoflops(
    table: pd.DataFrame, fit: Callable[[pd.DataFrame], Any], budget: str, by: str | None
) -> tuple[dict[str, Any], str]:
    """The fit, or with `by` one per value under `groups`, and its summary."""
    for name in (budget, *([by] if by else [])):
        require_column(table, name)
    if table[budget].nunique() == 1:
        raise UserError(f"column {budget!r} holds one budget, {table[budget].iloc[0]}: a power law needs three")
    named = [("", table)] if by is None else table.groupby(by, sort=False, dropna=False)
    groups = {str(name): fit(rows) for name, rows in named}
    if not any(np.isfinite(vertex.curvature) for group in groups.values() for vertex in group.vertices):
        raise UserError("no budget has runs of three different sizes, the least for a parabola (five are wanted)")
    if by is None:
        return groups[""].to_dict(), summary(groups[""])
    statuses = [group.status for group in groups.values() if group.status is not FitStatus.CONVERGED]
    stored = {
        "law": IsoflopFit.law,
        "n": len(table),
        "status": str((statuses or [FitStatus.CONVERGED])[0]),
        "objective_name": "mse",
        "objective_value": sum(group.objective_value for group in groups.values()),
        "ci": {},
        "by": by,
        "groups": {name: group.to_dict() for name, group in groups.items()},
    }
    return stored, "\n".join(f"{by} = {name}\n{summary(group)}" for name, group in groups.items())


def summary(fit: Any) -> str:
    """A fit in a few lines: every coefficient with its interval, every minimum with its flag, every warning."""
    lines = [f"{fit.law}: {fit.n} runs, {fit.status}, {fit.objective_name} {fit.objective_value:.8g}"]
    for vertex in fit.vertices if isinstance(fit, IsoflopFit) else ():
        x, loss = _number(vertex.x, vertex.x_interval), _number(vertex.loss, vertex.loss_interval)
        lines.append(f"  budget {vertex.budget:<8.4g} x {x}  loss {loss}  n {vertex.n}  {vertex.status}")
    names = [item.name for item in fields(fit.form)] + (["a", "b"] if fit.law == "parametric" else [])
    lines += [f"  {name:<12} {_number(getattr(fit, name), fit.ci.get(name))}" for name in names]
    if fit.bootstrap is not None:
        drawn = fit.bootstrap
        lines.append(f"  {drawn.resamples} resamples, {drawn.failed} failed, {drawn.at_bound} at a bound")
    return "\n".join([*lines, *(f"  warning: {warning}" for warning in fit.warnings)])


def write_json(path: Path, stored: Mapping[str, Any]) -> None:
    text = json.dumps(stored, indent=1, allow_nan=False)
    lists_of_numbers = r"\[\s+([^\[\]{}\"]*?)\s+\]"
    text = re.sub(lists_of_numbers, lambda found: f"[{' '.join(found[1].split())}]", text)
    try:
        write_text(path, text + "\n")
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
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{arguments.file} is no fit of this program: {_first_line(error)}") from None


def predictions(stored: Mapping[str, Any], given: argparse.Namespace) -> list[str]:
    """A line per answer of a stored fit, with its interval where the fit has a bootstrap."""
    form = FORMS[stored["law"]]
    coefficients = {item.name: stored[item.name] for item in fields(form)}
    if None in coefficients.values():
        return [f"  no prediction: the fit's status is {stored['status']}"]
    found = answers(stored["law"], form(**coefficients), given)
    drawn: dict[str, tuple[float, float]] = {}
    if stored["bootstrap"]:
        bootstrap = Bootstrap.from_dict(stored["bootstrap"])
        laws = form(**{name: bootstrap.draws[name] for name in coefficients})
        drawn = {name: bootstrap.interval(values) for name, values in answers(stored["law"], laws, given).items()}
    return [f"  {name:<16} {_number(value, drawn.get(name))}" for name, value in found.items()]


def answers(name: str, law: Any, given: argparse.Namespace) -> dict[str, Any]:
    """What the numbers given on the command line ask of a law, by name."""
    n, d, found = given.params, given.tokens, {}
    match name:
        case "isoflop" if given.budget:
            found = {"optimal x": law.optimum(given.budget)}
        case "parametric" | "data_constrained":
            if given.budget:
                best = law.optimum(given.budget)
                found = {"optimal params": best.params, "optimal tokens": best.tokens, "optimal loss": best.loss}
            if n and d:
                repeated = name == "data_constrained" and given.unique_tokens
                found["loss"] = law.predict_repeated(n, d, given.unique_tokens) if repeated else law.predict(n, d)
        case "routed" if n and given.experts:
            found = {"loss": law.predict(n, given.experts), "effective params": law.effective_params(n, given.experts)}
        case "granular" if n and d and given.granularity:
            found = {"loss": law.predict(n, d, given.granularity)}
    if not found:
        raise UserError(f"a prediction of the {name} law needs {NEEDS[name]}")
    return found


def _number(value: Any, interval: tuple[float, float] | None) -> str:
    if value is None or not np.isfinite(value):
        return "none"
    shown = f" [{interval[0]:.4g}, {interval[1]:.4g}]" if interval and np.isfinite(interval).all() else ""
    return f"{float(value):.6g}{shown}"


def _first_line(error: Exception) -> str:
    lines = str(getattr(error, "strerror", None) or error).splitlines()
    return lines[0] if lines else type(error).__name__


if __name__ == "__main__":
    sys.exit(exit_code(main))
