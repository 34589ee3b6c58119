"""One self-contained HTML page of a study: answer, figures, results, fits, setup, what went wrong, how to repeat it.

    .venv/bin/python analysis/report.py SWEEP

Works on runs/SWEEP/study, else on results/SWEEP, and writes report.html there; first: figures.py and table.py. Nothing
in the page is loaded from elsewhere, and what is not there to be shown is named in it.
"""

import base64
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup

from peerscale.cell_names import budget_name
from peerscale.composition import sweep_file
from peerscale.config import ConfigError
from peerscale.errors import UserError, exit_code
from peerscale.files import write_text
from peerscale.laws.optima import OptimumStatus
from peerscale.runs.fits import RESAMPLES
from peerscale.runs.record import Record
from peerscale.runs.study import Study, find_study, header, method_names, read_fits, study_parser, usable
from peerscale.runs.table import read_records, read_runs
from peerscale.viz.ablations import has_curves
from peerscale.viz.style import label, ordered, short_number, size_label
from peerscale.viz.tables import Fits, number, with_interval

FIGURES = {
    "isoflop": "Perplexity against model size at equal training compute (the paper's Figure 1)",
    "experts": "Number of experts (the paper's Figure 3a)",
    "active": "Active experts and heads (the paper's Figure 3b)",
    "query_norm": "BatchNorm on the queries (the paper's Figure 4)",
    "differences": "Difference to dense at the compute optimum",
    "frontier": "Compute-optimal loss, and the compute multiplier over dense",
    "time": "Loss against training time",
    "curves": "Training curves",
    "rates": "Learning rates",
}
"""Titles, in the order of the page; a figure not named here comes after them."""

COLUMNS = {
    "val_loss": ("loss, nats per token", "{:.4f}"), "val_loss_se": ("± s.e.", "{:.4f}"),
    "val_bits_per_byte": ("bits per byte", "{:.3f}"), "params_total": ("parameters", "{:,.0f}"),
    "params_active": ("active parameters", "{:,.0f}"), "flops_per_token": ("FLOPs per token", "{:,.0f}"),
    "layer_share": ("layer's share", "{:.1%}"), "tokens": ("tokens", "{:,.0f}"), "steps": ("steps", "{:,.0f}"),
    "batch_sequences": ("batch", "{:.0f}"), "lr": ("learning rate", "{:.3g}"), "table_lr": ("of tables", "{:.3g}"),
    "expert_usage": ("experts used", "{:.1%}"), "unevenness": ("unevenness", "{:.2f}"),
    "wall_s": ("training seconds", "{:,.0f}"), "tokens_per_s": ("tokens per second", "{:,.0f}"),
}  # fmt: skip
"""Columns of runs.csv that are shown: heading and format."""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = study_parser(__doc__).parse_args(argv)
    study = find_study(arguments.sweep, arguments.runs, arguments.results)
    loader = FileSystemLoader(Path(__file__).parent)
    templates = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    path = study.folder / "report.html"
    write_text(path, templates.get_template("report.html.j2").render(content(study)))
    print(path)
    return 0


def content(study: Study) -> dict[str, Any]:
    """What the template shows; tables are data frames of strings, empty where there is nothing to tell."""
    runs = read_runs(study.runs)
    if runs.empty:
        raise UserError(f"{study.runs} has no rows")
    runs = runs.assign(name=method_names(runs))
    records = read_records(study.folder)
    ran = [record for record in records if record.environment]
    text = sweep_text(study.sweep)
    fits = read_fits(study.fits) if has_curves(runs) and study.fits.is_file() else {}
    common, differing = recipe(ran or records, dict(zip(runs["cell"], runs["name"], strict=True)))
    absent = {
        f"sweeps/{study.sweep}.yaml: the question, and what it takes to run the study": not text,
        "fits.json: optima and laws (make figures)": has_curves(runs) and not fits,
        "records.jsonl: recipe, run signals, versions and hardware": not records,
        "table.md: the results (make figures)": not study.table.is_file(),
        "figures (make figures)": not list(study.figures.glob("*.png")),
    }
    return {
        "sweep": study.sweep,
        "folder": f"runs/{study.sweep}/study" if study.folder.name == "study" else f"results/{study.sweep}",
        "missing": [what for what, missing in absent.items() if missing],
        "runs": runs,
        "counts": ", ".join(f"{n} {status}" for status, n in runs["status"].value_counts().sort_index().items()),
        "header": header(text),
        "sweep_text": text,
        "grid": grid(runs),
        "common": common,
        "differing": differing,
        "results": results(study),
        "figures": figures(study),
        "answer": fits.get("answer", ""),
        "optima": optima(fits),
        "laws": power_laws(fits),
        "surfaces": surfaces(fits),
        "resamples": RESAMPLES,
        "unfinished": runs.loc[~usable(runs), ["cell", "status", "reason"]].replace({"reason": {"": "—"}}),
        "warnings": warnings(fits),
        "signals": signals(records),
        "cells": cells(runs),
        "environment": environment(ran),
        "commits": sorted({str(record.environment.get("git_commit")) for record in ran}),
        "software": {"Python": platform.python_version()} | {p: version(p) for p in ("numpy", "scipy", "pandas")},
    }


def sweep_text(sweep: str) -> str:
    """The study's file; empty if there is none."""
    try:
        return sweep_file(sweep).read_text(encoding="utf-8")
    except ConfigError:
        return ""


def grid(runs: pd.DataFrame) -> pd.DataFrame:
    """A row for each budget and method: sizes, seeds, cells, and what they come to."""
    spans = {key: COLUMNS[key][0] for key in ("params_total", "flops_per_token", "tokens", "steps") if key in runs}
    rows = []
    for budget, at_budget in runs.groupby("budget"):
        for name in at_budget["name"].unique():  # the plan's order, in which settings ascend
            mine = at_budget[at_budget["name"] == name]
            row = {"budget": budget_name(float(str(budget))), "method": label(name)}
            row |= {
                "sizes": ", ".join(map(size_label, mine["size"].unique())).replace(", d_model ", ", "),
                "seeds": ", ".join(map(str, sorted(set(mine["seed"])))),
            }
            row["finished"] = f"{usable(mine).sum()} of {len(mine)}"
            for key, title in spans.items():
                row[title] = " – ".join(dict.fromkeys(map(short_number, (mine[key].min(), mine[key].max()))))
            rows.append(row)
    return pd.DataFrame(rows)


def recipe(records: Sequence[Record], names: Mapping[str, str]) -> tuple[dict[str, str], pd.DataFrame]:
    """Every setting that determines a result: common to all cells, and, a column a method, those that differ."""
    if not records:
        return {}, pd.DataFrame()
    settings = pd.json_normalize([record.hashed_config for record in records]).map(plain)
    by_method = settings.groupby([names.get(record.cell, record.method) for record in records], sort=False)
    differ = [key for key in settings if settings[key].nunique() > 1]
    columns = {label(str(name)): [", ".join(rows[key].unique()) for key in differ] for name, rows in by_method}
    return settings.drop(columns=differ).iloc[0].to_dict(), pd.DataFrame({"setting": differ, **columns})


def plain(value: Any) -> str:
    """A setting in a few characters; a dash for one that the layer does not have."""
    if value is None or value == "" or value != value:
        return "—"
    return f"{value:.6g}".replace("e+", "e") if isinstance(value, float) else str(value)


def results(study: Study) -> Markup:
    """The study's table.md, below a heading of the page."""
    if not study.table.is_file():
        return Markup("")
    text = re.sub(r"^#+", "###", study.table.read_text(encoding="utf-8"), flags=re.MULTILINE)
    html = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    return Markup(html.replace("<table>", '<div class="box"><table>').replace("</table>", "</table></div>"))


def figures(study: Study) -> list[tuple[str, str, str]]:
    """Title, file and PNG in base 64."""
    order = {stem: i for i, stem in enumerate(FIGURES)}
    paths = sorted(study.figures.glob("*.png"), key=lambda path: (order.get(path.stem, len(order)), path.stem))
    titles = [FIGURES.get(path.stem, path.stem.replace("_", " ")) for path in paths]
    return [(t, p.name, base64.b64encode(p.read_bytes()).decode()) for t, p in zip(titles, paths, strict=True)]


def of_law(fits: Fits, law: str) -> list[Mapping[str, Any]]:
    """The fits of one law, methods in the order of every table."""
    chosen = [fit for fit in fits.get("laws", {}).values() if fit["law"] == law]
    order = {name: i for i, name in enumerate(ordered(fit["method"] for fit in chosen))}
    return sorted(chosen, key=lambda fit: order[fit["method"]])


def optima(fits: Fits) -> pd.DataFrame:
    """A row for each budget and method: where its minimum lies, over FLOPs per token."""
    rows = [
        {
            "budget": budget_name(entry["budget"]), "method": label(m["name"]),
            "optimal FLOPs per token": with_interval(m["x"], m["x_interval"], "{:.3g}"),
            "loss there": number(m["loss"], "{:.4f}"), "± s.e.": number(m.get("se"), "{:.4f}"),
            "with its own curvature": number(m["own"]["loss"], "{:.4f}"),
            "own curvature": number(m["own"]["curvature"], "{:.2f}"), "sizes": str(len(m["sizes"])),
            "flag": "—" if m["status"] == OptimumStatus.OK else m["status"].replace("_", " "),
        }
        for entry in fits.get("budgets", ()) for m in entry["methods"]
    ]  # fmt: skip
    return pd.DataFrame(rows)


def power_laws(fits: Fits) -> pd.DataFrame:
    """Optimal FLOPs per token = coefficient x FLOPs^exponent by approaches 2 and 1, where there are budgets enough."""
    rows = []
    for law, approach in (("isoflop", "2, isoFLOP optima"), ("envelope", "1, envelope of curves")):
        for fit in (fit for fit in of_law(fits, law) if fit["exponent"] is not None):
            row = {"approach": approach, "method": label(fit["method"])}
            row |= {key: with_interval(fit[key], fit["ci"].get(key)) for key in ("exponent", "coefficient")}
            rows.append(row | {"status": fit["status"].replace("_", " ")})
    return pd.DataFrame(rows)


def surfaces(fits: Fits) -> pd.DataFrame:
    """Approach 3: coefficients of L = E + A / N^alpha + B / D^beta, and the largest budget as the others predict it."""
    rows = []
    for fit in of_law(fits, "parametric"):
        row = {"method": label(fit["method"]), "runs": str(fit["n"])}
        row |= {key: with_interval(fit[key], fit["ci"].get(key)) for key in ("E", "A", "B", "alpha", "beta", "a")}
        held = fit["hold_out"]
        row["largest budget: mean loss predicted"] = row["observed"] = "—"
        if held:
            row["largest budget: mean loss predicted"] = with_interval(held["predicted"], held["interval"], "{:.4f}")
            row["observed"] = number(held["observed"], "{:.4f}")
        rows.append(row | {"status": fit["status"].replace("_", " ")})
    return pd.DataFrame(rows)


def warnings(fits: Fits) -> pd.DataFrame:
    """Every warning of the laws once, with the methods that it is of."""
    found: dict[tuple[str, ...], list[str]] = {}
    for fit in fits.get("laws", {}).values():
        for warning in fit.get("warnings", ()):
            found.setdefault((fit["law"], warning.replace("_", " ")), []).append(label(fit["method"]))
    return pd.DataFrame([(*key, ", ".join(who)) for key, who in found.items()], columns=["law", "warning", "of"])


def signals(records: Sequence[Record]) -> pd.DataFrame:
    """What happened in training, cell by cell."""
    inexact = "resumed on another machine, thread count, kernel or torch: not bit for bit what one run gives"
    rows = [
        {"cell": record.cell, "signal": signal}
        for record in records
        for signal in (*record.signals, *([] if record.bit_exact else [inexact]))
    ]
    return pd.DataFrame(rows)


def cells(runs: pd.DataFrame) -> pd.DataFrame:
    """Every cell, with the columns that hold anything."""
    sets = {str(c): (f"ppl {str(c)[4:]}", "{:.2f}") for c in runs if str(c).startswith("ppl_")}
    chosen = {key: shown for key, shown in (COLUMNS | sets).items() if key in runs and runs[key].notna().any()}
    numbers = {title: [number(value, form) for value in runs[key]] for key, (title, form) in chosen.items()}
    return pd.DataFrame({"cell": runs["cell"], "status": runs["status"], **numbers})


def environment(records: Sequence[Record]) -> dict[str, str]:
    """What the cells ran on; where they differ, with the number of cells."""
    table = pd.json_normalize([record.environment for record in records]).map(plain)
    counts = {str(key): table[key].value_counts().sort_index() for key in table}
    return {
        key: ", ".join(f"{value} ({n} cells)" if len(found) > 1 else str(value) for value, n in found.items())
        for key, found in counts.items()
    }


if __name__ == "__main__":
    sys.exit(exit_code(main))
