"""A study: the paths of its files, and which rows of its table form a curve and can be fitted."""

import itertools
import json
from argparse import RawDescriptionHelpFormatter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from peerscale.errors import ArgumentParser, UserError
from peerscale.files import ROOT
from peerscale.plan.plan import Verdict
from peerscale.records.cell_names import are_brackets as cells_are_brackets
from peerscale.records.cell_names import axes_label, budget_name
from peerscale.records.record import Record, Status, new_record

if TYPE_CHECKING:
    from peerscale.plan.cells import Cell

RUNS, RESULTS = ROOT / "runs", ROOT / "results"

CURVE_SIZES = 3
"""Fewest sizes for a curve of a method at a budget. With fewer, methods are compared at each size that they share."""


class _File:
    """A property that gives the path of a file in a study's folder."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, study: "Study", _: type) -> Path:
        return study.folder / self.name


@dataclass(frozen=True, kw_only=True)
class Study:
    """The files of one study: `runs/<sweep>/study/`, or `results/<sweep>/` once published."""

    sweep: str
    folder: Path
    runs = _File("runs.csv")
    """One row per cell, including cells without a result."""
    records = _File("records.jsonl")
    """One record per line."""
    curves = _File("curves.csv")
    """Shortened training curves."""
    fits = _File("fits.json")
    """All statistics and laws of the study."""
    table = _File("table.md")
    """The closing table, in Markdown."""
    figures = _File("figures")


def study_parser(script: str, description: str | None) -> ArgumentParser:
    """The command line of `analysis/<script>.py`, which works on one study."""
    program = f".venv/bin/python analysis/{script}.py"
    parser = ArgumentParser(prog=program, description=description, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("sweep", metavar="SWEEP", help="name of a study")
    parser.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help="where cells are kept (default: runs)")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="DIR", help="where studies are published (default: results)"
    )
    return parser


def collected(sweep: str, runs: Path = RUNS) -> Study:
    """The study as collected from its cells; its files may not exist."""
    return Study(sweep=sweep, folder=runs / sweep / "study")


def published(sweep: str, results: Path = RESULTS) -> Study:
    """The study as published; its files may not exist."""
    return Study(sweep=sweep, folder=results / sweep)


def find_study(sweep: str, runs: Path = RUNS, results: Path = RESULTS) -> Study:
    """The collected study, or else the published one; raises `UserError` if neither exists."""
    places = (collected(sweep, runs), published(sweep, results))
    for study in places:
        if study.runs.is_file():
            return study
    looked = " nor ".join(str(study.runs) for study in places)
    raise UserError(f"study {sweep!r} is not collected: neither {looked}; first: make figures SWEEP={sweep}")


def header(text: str) -> dict[str, str]:
    """The opening comment of a study's file, by keyword: `# Question: ...`, which may continue on further lines."""
    entries: dict[str, str] = {}
    for line in itertools.takewhile(lambda line: line.startswith("# "), text.splitlines()):
        word, colon, rest = line.lstrip("# ").partition(": ")
        starts = bool(colon) and word.isalpha() and word.istitle()
        key = word if starts else next(reversed(entries), "Question")
        entries[key] = f"{entries.get(key, '')} {rest if starts else line.lstrip('# ')}".strip()
    return entries


def read_json(path: Path) -> Any:
    """The content of a study's JSON file; raises `UserError` if it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is not there; collect the study first") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error.msg} at line {error.lineno})") from None


def read_fits(path: Path) -> dict[str, Any]:
    """The result of `runs.fits.fit_study`, with the `answer` as a sentence; raises `UserError` for any other file."""
    fits = read_json(path)
    keys = {"answer", "budgets", "claims", "multipliers", "laws", "rates"}
    if isinstance(fits, dict) and keys <= fits.keys():
        methods = [method for budget in fits["budgets"] for method in budget["methods"]]
        known = all("low" in method for method in methods if method["loss"] is not None)
        if known and all("family" in claim for claim in fits["claims"]):
            return fits
    raise UserError(f"{path}: not the fits of a study as this version writes them: make figures, to fit it again")


def method_names(table: pd.DataFrame, without: Sequence[str] = ()) -> pd.Series:
    """For each row the name of the curve to which it belongs.

    The name is `<method>[_<variant>]`, as the layer's file, followed by the values of the study's further axes (except
    those in `without`), so that variants are never mixed in one fit.
    """
    variant = table["variant"].fillna("").astype(str)
    names = table["method"].astype(str) + variant.where(variant == "", "_" + variant)
    axes = axes_of(table)
    if axes.map(axes_label).nunique() < 2:
        return names
    labels = axes.map(lambda each: axes_label({key: value for key, value in each.items() if key not in without}))
    return names + labels.where(labels == "", " " + labels)


def axes_of(table: pd.DataFrame) -> pd.Series:
    """For each row the axes of its cell (dotted keys and values), which the table has as JSON."""
    texts = table["axes"] if "axes" in table else [""] * len(table)
    parsed = [json.loads(text) if isinstance(text, str) and text else {} for text in texts]
    return pd.Series(parsed, index=table.index, dtype=object)


def are_brackets(table: pd.DataFrame) -> pd.Series:
    """Which rows bracket the learning rate of another row; they are neither points of a curve nor variants."""
    methods = table["method"].astype(str) + "_" + table["variant"].fillna("").astype(str)
    return pd.Series(cells_are_brackets(list(methods), list(axes_of(table))), index=table.index, dtype=bool)


def without_brackets(table: pd.DataFrame) -> pd.DataFrame:
    """The rows without rate brackets, which curves, laws and counts use."""
    return table[~are_brackets(table)]


def is_dense(name: str) -> bool:
    """Whether a curve is of the dense model, with any settings."""
    return name.partition(" ")[0] == "dense"


def same_variant(reference: str, name: str, names: Collection[str]) -> str | None:
    """The curve of `reference` with the same settings as `name`, or else without settings; None if there is none."""
    variant = reference + name.removeprefix(name.partition(" ")[0])
    return next((found for found in (variant, reference) if found in names and found != name), None)


def usable(table: pd.DataFrame) -> pd.Series:
    """Which rows can be fitted: finished cells with a finite loss."""
    loss = pd.to_numeric(table["val_loss"], errors="coerce")
    return (table["status"] == str(Status.DONE)) & np.isfinite(loss)


def at_size(values: pd.Series, table: pd.DataFrame, flops_per_token: Any) -> np.ndarray:
    """The values of some rows of a table at other FLOPs per token, log-linear between the sizes of these rows."""
    known = values.groupby(table["flops_per_token"]).mean().sort_index()
    sizes, there = np.log(known.index.to_numpy(float)), np.log(known.to_numpy(float))
    return np.exp(np.interp(np.log(flops_per_token), sizes, there))


def budgets_with_curves(table: pd.DataFrame) -> set[float]:
    """Budgets at which a method has enough sizes for a curve, `CURVE_SIZES` of them."""
    sizes = table.assign(name=method_names(table)).groupby(["budget", "name"])["size"].nunique()
    return {float(budget) for budget, _ in sizes[sizes >= CURVE_SIZES].index}


def batches(table: pd.DataFrame, budgets: Iterable[float]) -> str:
    """The batch at each of these budgets if it is not the same: `16 sequences at 3e12, 32 sequences at 1e13`."""
    rows = without_brackets(table[usable(table) & table["budget"].isin([*budgets])])
    each = rows.groupby("batch_sequences")["budget"].unique()
    if len(each) < 2 or rows.groupby("budget")["batch_sequences"].nunique().max() > 1:
        return ""
    return ", ".join(f"{batch} sequences at {' and '.join(map(budget_name, sorted(at)))}" for batch, at in each.items())


def planned_record(cell: "Cell") -> Record:
    """A record for a cell that has none yet: either dropped by its plan, or pending."""
    status = Status.DROPPED if cell.plan.verdict is Verdict.DROP else Status.PENDING
    return replace(new_record(cell, status, ""), reason=cell.plan.reason, fingerprint="")
