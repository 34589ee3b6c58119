"""Fit scaling laws to any table of runs.

    .venv/bin/python analysis/fit.py parametric runs.csv --params N --tokens D --loss loss --out fit.json
    .venv/bin/python analysis/fit.py isoflop runs.csv --budget C --x N --loss loss --by method --out fit.json
    .venv/bin/python analysis/fit.py routed runs.csv --dense-params N --experts E --loss loss --out fit.json
    .venv/bin/python analysis/fit.py granular runs.csv --params N --tokens D --granularity G --loss loss --out fit.json
    .venv/bin/python analysis/fit.py rates runs.csv --lr lr --loss loss --width d --tokens D --batch B --by method \\
        --out fit.json

The values of --params, --x and so on are names of columns. Instead of a table of runs, you can give the folder of a
study, such as results/reproduce. Intervals are 95 % percentile intervals of a bootstrap over runs (`isoflop`: over
residuals), for `rates` Fieller's. Every fit also reports how well the smaller budgets predict the largest one; `rates`
reports how well the law predicts the best rates of models that it was not fitted to.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from peerscale import api as laws
from peerscale.errors import ArgumentParser, UserError, exit_code, natural_number, positive_number
from peerscale.files import write_json
from peerscale.laws.isoflop import IsoflopFit
from peerscale.laws.least_squares import FitStatus, Objective
from peerscale.laws.table import positive_columns, require_column
from peerscale.records.matching import some
from peerscale.records.table import read_runs
from peerscale.records.table import read_table as read_csv
from peerscale.stats.curve import curves_of, usable, without_brackets
from peerscale.stats.rates import curves_of_law, tries_rates

PROGRAM = ".venv/bin/python analysis/fit.py"
COMMANDS: dict[str, tuple[Callable[..., Any], str, str, str]] = {
    "parametric": (laws.fit_parametric, "params loss", "tokens flops objective delta budget hold-out cluster",
                   "L = E + A / N^alpha + B / D^beta"),
    "isoflop": (laws.fit_isoflop, "budget x loss", "by include-flagged within tolerance cluster",
                "a parabola per budget, a power law through the minima"),
    "routed": (laws.fit_routed, "dense-params experts loss", "budget hold-out cluster",
               "log10 L = a n + b e + c n e + d"),
    "granular": (laws.fit_granular, "params tokens granularity loss", "budget hold-out cluster",
                 "L = c + (g / G^gamma + a) / N^alpha + b / D^beta"),
    "rates": (laws.fit_rates, "lr loss", "width tokens batch by curve hold-out",
              "lr = m (width / width_0)^-a (tokens / tokens_0)^-b (batch / batch_0)^c"),
}  # fmt: skip
"""Function, columns, options and help text of each command."""
COLUMNS = {
    "params": "the number of parameters",
    "dense-params": "the number of parameters that one token uses",
    "tokens": "the training tokens",
    "flops": "the training FLOPs; C = 6 N D then gives the tokens",
    "budget": "the compute budget: one value for all runs of a budget; other laws only hold out the largest budget",
    "x": "the size whose optimum is sought, such as parameters, tokens or FLOPs per token",
    "experts": "the number of experts",
    "granularity": "the granularity, or the experts that one token uses",
    "loss": "the loss",
    "lr": "the peak learning rate used in training",
    "width": "the model's width",
    "batch": "the batch, in tokens or sequences",
    "by": "the method: one fit per method, or for rates one m per method",
    "cluster": "the cluster: runs with the same value are resampled together",
}
NUMBER = {"type": positive_number, "metavar": "NUMBER"}
FAR = "leave out sizes whose loss is more than this share above the budget's lowest, such as .04; keep at least five"
OPTIONS: dict[str, dict[str, Any]] = {
    "objective": {"choices": list(Objective), "default": Objective.HUBER_LOG, "help": "what is minimised (huber-log)"},
    "delta": {**NUMBER, "default": 1e-3, "help": "residual at which Huber becomes linear (1e-3)"},
    "hold-out": {**NUMBER, "help": "hold out the runs from this budget on"},
    "include-flagged": {"action": "store_true", "help": "let the power law use flagged minima too"},
    "within": {**NUMBER, "help": FAR},
    "tolerance": {**NUMBER, "help": "merge budgets that differ from their neighbour by at most this share, .1"},
    "curve": {"metavar": "COL", "nargs": "*", "default": [], "help": "further columns equal in the runs of a curve"},
    "rates hold-out": {"metavar": "EXPR", "help": "rows that test the law; default: each model in turn"},
}
RESAMPLES = 1000
NOT_IN_SOURCE = ("bootstrap", "seed", "cluster", "hold_out")


def main(argv: Sequence[str] | None = None) -> int:
    given = vars(parser().parse_args(argv))
    command = given.pop("command")
    law, (path, where, out) = COMMANDS[command][0], (given.pop(name) for name in ("table", "where", "out"))
    table = read_table(path, where)
    described = dict(given)
    layers = ("variant",) if law is laws.fit_rates else ("variant", "settings", "rate_factor")
    mixed = [] if path.is_dir() else pooled(table, given.get("by") or "method", layers)
    if law is laws.fit_rates:
        stored, text = fit_learning_rates(table, **given)
    else:
        by = given.pop("by", None)
        if law is laws.fit_isoflop:
            table = one_budget_each(table, given["budget"], given.pop("tolerance"))
            require_parabola(table, [*([by] if by else []), given["budget"]], given["x"])
        stored, text = fit_groups(table, lambda rows: law(rows, **given), by, given.get("x", ""))
        unnamed = {*NOT_IN_SOURCE, *({"budget"} if law is not laws.fit_isoflop else ())}
        described = {name: value for name, value in given.items() if name not in unnamed}
    if mixed:
        stored["warnings"] = [*stored.get("warnings", ()), *mixed]
        text += "".join(f"\n  warning: {warning}" for warning in mixed)
    write_json(out, stored | {"source": {"table": path.name, "where": where, **described}})
    print(f"{text}\n-> {out}")
    return 0


def parser() -> argparse.ArgumentParser:
    top = ArgumentParser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)
    for command, (law, columns, options, text) in COMMANDS.items():
        add = commands.add_parser(command, help=text, description=text).add_argument
        add("table", type=Path, metavar="TABLE", help="CSV file, one row per run; or a study's folder")
        for name in (*columns.split(), *options.split()):
            if name in COLUMNS:
                about = f"column of {COLUMNS[name]}"
                add(f"--{name}", metavar="COL", required=name in columns.split(), help=about)
            else:
                add(f"--{name}", **OPTIONS.get(f"{command} {name}", OPTIONS[name]))
        add("--where", metavar="EXPR", help="rows to fit, as a pandas query: \"method == 'dense'\"")
        if law is not laws.fit_rates:
            text = f"resamples ({RESAMPLES})"
            add("--bootstrap", type=natural_number, default=RESAMPLES, metavar="N", help=text)
            add("--seed", type=natural_number, default=0, help="seed of the resampling (0)", metavar="N")
        add("--out", type=Path, required=True, metavar="JSON", help="file to write the fit to")
    return top


def read_table(path: Path, where: str | None) -> pd.DataFrame:
    """The rows of a CSV (labelled by line), or of a study's finished runs, that satisfy the query.

    In a study, `method` is the name of the curve: layers and settings are not mixed, and rate brackets are left out.
    """
    if path.is_dir():
        table = read_runs(path)
        table = table if (of_rates := tries_rates(table)) else without_brackets(table)
        curves = curves_of_law(table) if of_rates else curves_of(table)
        table = table.assign(method=curves.map(str))[usable(table)]
        if table.empty:
            raise UserError(f"the study {path} has no finished run")
    else:
        table = read_csv(path, skipinitialspace=True)
        table.index = pd.RangeIndex(2, len(table) + 2, name="line")
    if table.empty:
        raise UserError(f"the table {path} has no rows")
    chosen = table if where is None else table[rows_that("--where", where, table)]
    if chosen.empty:
        raise UserError(f"--where {where!r} leaves none of the {len(table)} rows")
    return chosen


def rows_that(option: str, query: str, table: pd.DataFrame) -> pd.Series:
    """Which rows satisfy the query."""
    try:
        rows = table.eval(query, local_dict={}, global_dict={})  # a query sees only columns
    except Exception as error:  # a query can raise any Python exception
        there = ", ".join(map(str, table.columns))
        what = f"no {error}" if isinstance(error, KeyError) else [*str(error).splitlines(), type(error).__name__][0]
        raise UserError(f"{option} {query!r}: {what}; columns: {there}") from None
    if not (isinstance(rows, pd.Series) and pd.api.types.is_bool_dtype(rows)):
        raise UserError(f"{option} {query!r} is not a condition on rows, such as \"method == 'dense'\"")
    return rows.fillna(False)


def pooled(table: pd.DataFrame, by: str, layers: Sequence[str]) -> list[str]:
    """A warning for each value of `by` whose rows differ in one of the columns `layers`: it pools several layers."""
    there = [column for column in layers if column in table.columns and column != by]
    known = table.assign(**{column: table[column].astype(object).fillna("usual") for column in there})
    groups = known.groupby(by, sort=False) if by in table.columns else ()
    differ = [(name, column, rows[column].unique()) for name, rows in groups for column in there]
    return [
        f"{by} {name} pools {len(kinds)} kinds of runs that differ in {column!r}: {some([*map(str, kinds)])}; "
        "--where chooses one, and a study's folder in place of its table keeps them apart"
        for name, column, kinds in differ
        if len(kinds) > 1
    ]


def one_budget_each(table: pd.DataFrame, budget: str, tolerance: float | None) -> pd.DataFrame:
    """The table with neighbouring budgets that differ by at most `tolerance` replaced by their geometric mean."""
    (budgets,) = positive_columns(table, budget, law=IsoflopFit.law, at_least=1)
    if tolerance:
        steps = np.sort(np.log(budgets))
        starts = steps[1:][np.diff(steps) > np.log1p(tolerance)]
        logs = pd.Series(np.log(budgets)).groupby(np.searchsorted(starts, np.log(budgets), side="right"))
        budgets = np.exp(logs.transform("mean").to_numpy())
        table = table.assign(**{budget: budgets.tolist()})
    if np.ptp(budgets) == 0:
        raise UserError(f"column {budget!r} holds one budget, {budgets[0]:g}: a power law needs three")
    return table


def require_parabola(table: pd.DataFrame, one_curve: list[str], x: str) -> None:
    """Raise `UserError` if no curve, of rows with equal values in the columns `one_curve`, has three sizes `x`."""
    for column in (*one_curve, x):
        require_column(table, column)
    if table.groupby(one_curve, dropna=False)[x].nunique().max() < 3:
        raise UserError(
            "no budget has runs of three different sizes, the fewest for a parabola (five are recommended); "
            "--tolerance .1 groups measured FLOPs into budgets"
        )


def fit_groups(
    table: pd.DataFrame, fit: Callable[[pd.DataFrame], Any], by: str | None, x: str
) -> tuple[dict[str, Any], str]:
    """The fit (with `by`: one per value, under `groups`) and its summary."""
    if by is not None:
        require_column(table, by)
    named = [("", table)] if by is None else table.groupby(by, sort=False, dropna=False)
    groups = {str(name): fit(rows) for name, rows in named}
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
    """A fit in a few lines: coefficients and minima of `x` with intervals and flags, held-out error, and warnings."""
    lines = [f"{fit.law}: {fit.n} runs, {fit.status}, {fit.objective_name} {fit.objective_value:.8g}"]
    for optimum in fit.vertices if isinstance(fit, IsoflopFit) else ():
        size, loss = _number(optimum.x, optimum.x_interval), _number(optimum.loss, optimum.loss_interval)
        lines.append(f"  budget {optimum.budget:<8.4g} {x} {size}  loss {loss}  n {optimum.n}  {optimum.status}")
    for name in (*(item.name for item in fields(fit.form)), *fit.derived):
        lines.append(f"  {name:<12} {_number(getattr(fit, name), fit.ci.get(name))}")
    if isinstance(fit, IsoflopFit):
        lines.append(f"  exponent of approach 3 on the same runs {_number(fit.surface_exponent)}")
    if drawn := fit.bootstrap:
        lines.append(f"  {drawn.resamples} resamples, {drawn.failed} failed, {drawn.at_bound} at a bound")
    if held := fit.hold_out:
        observed, predicted = _number(held.observed, held.observed_interval), _number(held.predicted, held.interval)
        what = f"  held out from {held.budget:.4g}: {x if held.quantity == 'x' else held.quantity} of {held.n}"
        lines.append(f"{what}: {observed}, predicted {predicted}, mean error {held.mape:.3g} %")
    return "\n".join([*lines, *(f"  warning: {warning}" for warning in fit.warnings)])


def fit_learning_rates(table: pd.DataFrame, hold_out: str | None, **options: Any) -> tuple[dict[str, Any], str]:
    """The law of the best rate, and its summary with intervals and held-out error."""
    held = None if hold_out is None else rows_that("--hold-out", hold_out, table)
    if held is not None and not held.any():
        raise UserError(f"--hold-out {hold_out!r} holds out none of the {len(table)} rows")
    fit = laws.fit_rates(table, hold_out=held, **options)
    lines = [
        f"rates: {fit.n} runs on {fit.n_curves} curves, which scatter by {fit.scatter:.2g} about parabolas in ln lr of "
        f"curvature {fit.curvature:.3g} +- {fit.curvature_se:.1g}; {fit.exponents} exponents"
    ]
    for method, law in fit.laws.items():
        at = ", ".join(f"{name} {getattr(law, f'{name}_0'):g}" for name in fit.fitted)
        lines.append(f"  {method}{f' (m at {at})' * bool(at)}")
        lines += [f"    {name:<10} {_number(getattr(law, name), ci)}" for name, ci in law.ci.items()]
    if test := fit.equal_exponents:
        lines.append(f"  one set of exponents for all: F{test['df']} = {test['f']:.2f}, p = {test['p']:.2g}")
    for one in fit.held_out if held is not None else ():
        lines.append(f"  held out {one.name}: best {one.best:.3g}, predicted {one.predicted:.3g}, costs {one.cost:.2g}")
    if fit.held_out:
        off, cost = math.exp(fit.held_out_error), fit.held_out_cost
        lines.append(f"  {len(fit.held_out)} held-out curves: rates off by x {off:.3g}, which costs {cost:.2g}")
    return fit.to_dict(), "\n".join([*lines, *(f"  warning: {warning}" for warning in fit.warnings)])


def _number(value: Any, interval: tuple[float, float] | None = None) -> str:
    if value is None or not np.isfinite(value):
        return "none"
    shown = f" [{interval[0]:.4g}, {interval[1]:.4g}]" if interval and not np.isnan(interval).any() else ""
    return f"{float(value):.6g}{shown}"


if __name__ == "__main__":
    sys.exit(exit_code(main))
