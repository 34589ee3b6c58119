"""One self-contained HTML page of a study: answer, figures, results, setup, what went wrong, how to repeat it.

`report.md.j2` is its text, in Markdown; `report.html.j2` is the page around it. The page loads nothing from elsewhere,
and it names parts that are missing.
"""

import base64
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from peerscale.config.compose import header, sweep_text
from peerscale.errors import UserError
from peerscale.figures.figures import TITLES
from peerscale.figures.interactive import isoflop_html
from peerscale.figures.isoflop import status_counts
from peerscale.figures.markdown import html, number, table
from peerscale.figures.style import label
from peerscale.records.study import Study, read_fits
from peerscale.records.table import read_records, read_runs
from peerscale.stats.curves_of_runs import budgets_with_curves, method_names, usable, without_brackets

COLUMNS = {
    "val_loss": ("loss, nats per token", "{:.4f}"), "val_loss_se": ("± s.e.", "{:.4f}"),
    "val_bits_per_byte": ("bits per byte", "{:.3f}"), "params_total": ("parameters", "{:,.0f}"),
    "params_active": ("active parameters", "{:,.0f}"), "flops_per_token": ("FLOPs per token", "{:,.0f}"),
    "layer_share": ("layer's share", "{:.1%}"), "tokens": ("tokens", "{:,.0f}"), "steps": ("steps", "{:,.0f}"),
    "batch_sequences": ("batch", "{:.0f}"), "lr": ("learning rate", "{:.3g}"), "table_lr": ("of tables", "{:.3g}"),
    "expert_usage": ("experts used", "{:.1%}"), "unevenness": ("unevenness", "{:.2f}"),
    "wall_s": ("training seconds", "{:,.0f}"), "tokens_per_s": ("tokens per second", "{:,.0f}"),
}  # fmt: skip
"""The displayed columns of runs.csv: heading and format."""


def report(study: Study) -> str:
    """The page of a study.

    Raises:
        UserError: its table has no rows.
    """
    runs = read_runs(study.runs)
    if runs.empty:
        raise UserError(f"{study.runs} has no rows")
    main = without_brackets(runs)
    main = main.assign(name=method_names(main))
    records, text = read_records(study.folder), sweep_text(study.sweep)
    fits = read_fits(study.fits) if study.fits.is_file() else {}
    with_curves = budgets_with_curves(main[usable(main)])
    drawn = {path.stem for path in study.figures.glob("*.png")}
    figures = [name for name in TITLES if name in drawn] + sorted(drawn - {*TITLES})
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        autoescape=select_autoescape(["html.j2"]),
    )  # fmt: skip
    ran, names = (
        [record for record in records if record.environment],
        dict(zip(main["cell"], main["name"], strict=True)),
    )
    named = [(label(names[record.cell]), record) for record in ran or records if record.cell in names]
    content = {
        "sweep": study.sweep,
        "folder": f"runs/{study.sweep}/study" if study.folder.name == "study" else f"results/{study.sweep}",
        "runs": runs,
        "first": (main[usable(main)] if usable(main).any() else main).iloc[0],
        "counts": ", ".join(status_counts(runs)),
        "header": header(text),
        "sweep_text": text,
        "results": re.sub("^#+", "###", study.table.read_text("utf-8"), flags=re.M) if study.table.is_file() else "",
        "figures": {name: TITLES.get(name, name.replace("_", " ")) for name in figures},
        "answer": fits.get("answer", "") if with_curves or fits.get("claims") else "",
        "compares_budgets": len(with_curves) > 1,
        "unfinished": [
            {key: escaped(cell[key] or "—") for key in ("cell", "status", "reason")}
            for cell in runs[~usable(runs)].to_dict("records")
        ],
        "warnings": warnings(fits),
        "inexact": [{"cell": escaped(record.cell)} for record in records if not record.bit_exact],
        "recipe": settings([(name, record.hashed_config) for name, record in named]),
        "cells": cells(runs),
        "environment": settings([("value", record.environment) for record in ran]),
        "commits": sorted({str(record.environment.get("git_commit")) for record in ran}),
    }
    templates.filters |= {"lines": "\n".join, "table": table}
    body = html(templates.get_template("report.md.j2").render(content))
    body = re.sub(r"<h2>(\w+)", lambda found: f'<h2 id="{found[1].lower()}">{found[1]}', body)
    interactive = Markup(isoflop_html(main, fits)) if fits and "isoflop" in figures else ""
    page = templates.get_template("report.html.j2").render(content, body=Markup(body), interactive=interactive)
    return re.sub(r'src="(figures/[^"]+)"', lambda found: f'src="{_data(study.folder / found[1])}"', page)


def _data(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def escaped(text: str) -> str:
    """Text with Markdown's special characters escaped."""
    return re.sub(r"([\\`*_{}\[\]<>|])", r"\\\1", " ".join(text.split()))


def settings(trees: Sequence[tuple[str, Mapping[str, Any]]]) -> list[dict[str, str]]:
    """One row per setting, with a column for each name in `trees`; settings that differ come first."""
    if not trees:
        return []
    names, values = zip(*trees, strict=True)
    table = pd.json_normalize([*values]).map(plain)
    rows = [
        {
            "setting": str(key),
            **{str(name): ", ".join(of_name.unique()) for name, of_name in table[key].groupby([*names], sort=False)},
        }
        for key in table
    ]
    return sorted(rows, key=lambda row: table[row["setting"]].nunique() == 1)


def plain(value: Any) -> str:
    """A setting as short text; a dash if the layer does not have it."""
    if value is None or value == "" or value != value:
        return "—"
    return escaped(f"{value:.6g}".replace("e+", "e") if isinstance(value, float) else str(value))


def warnings(fits: Mapping[str, Any]) -> list[dict[str, str]]:
    """Every warning of the laws once, with the methods that have it."""
    found: dict[tuple[str, str], list[str]] = {}
    for fit in fits.get("laws", {}).values():
        for warning in fit.get("warnings", ()):
            found.setdefault((fit["law"], warning.replace("_", " ")), []).append(label(fit["method"]))
    return [{"law": law, "warning": warning, "of": ", ".join(who)} for (law, warning), who in found.items()]


def cells(runs: pd.DataFrame) -> list[dict[str, str]]:
    """Every cell, with the columns that are not empty."""
    sets = {str(c): (f"ppl {str(c)[4:]}", "{:.2f}") for c in runs if str(c).startswith("ppl_")}
    chosen = {key: shown for key, shown in (COLUMNS | sets).items() if key in runs and runs[key].notna().any()}
    return [
        {"cell": escaped(row["cell"]), "status": row["status"],
         **{title: number(row[key], form) for key, (title, form) in chosen.items()}}
        for row in runs.to_dict("records")
    ]  # fmt: skip
