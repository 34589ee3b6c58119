"""A study: where its files lie, and which rows of its table make one curve and can be fitted."""

import itertools
import json
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd

from peerscale.config import Config, RetrievalConfig
from peerscale.errors import ArgumentParser, UserError
from peerscale.files import ROOT
from peerscale.plan import Plan, Verdict
from peerscale.runs.record import Record, Status, science

RUNS, RESULTS = ROOT / "runs", ROOT / "results"


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """The files of one study: `runs/<sweep>/study/`, or `results/<sweep>/` once published."""

    sweep: str
    folder: Path

    @property
    def runs(self) -> Path:
        """One row a cell, those without a result included."""
        return self.folder / "runs.csv"

    @property
    def records(self) -> Path:
        """One record a line."""
        return self.folder / "records.jsonl"

    @property
    def curves(self) -> Path:
        """Thinned training curves."""
        return self.folder / "curves.csv"

    @property
    def fits(self) -> Path:
        """All statistics and laws of the study."""
        return self.folder / "fits.json"

    @property
    def table(self) -> Path:
        """The closing table, in Markdown."""
        return self.folder / "table.md"

    @property
    def figures(self) -> Path:
        return self.folder / "figures"


class PlannedCell(Protocol):
    """What a study's table needs of a cell that was never run."""

    @property
    def name(self) -> str: ...
    @property
    def config(self) -> Config: ...
    @property
    def plan(self) -> Plan: ...


def study_parser(script: str, description: str | None) -> ArgumentParser:
    """Command line of `analysis/<script>.py`, which works on one study."""
    program = f".venv/bin/python analysis/{script}.py"
    parser = ArgumentParser(prog=program, description=description, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("sweep", metavar="SWEEP", help="name of a study")
    parser.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help="where cells are kept (default: runs)")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="DIR", help="where studies are published (default: results)"
    )
    return parser


def collected(sweep: str, runs: Path = RUNS) -> Study:
    """The study as collected from its cells, whether or not it is there."""
    return Study(sweep=sweep, folder=runs / sweep / "study")


def published(sweep: str, results: Path = RESULTS) -> Study:
    """The study as committed, whether or not it is there."""
    return Study(sweep=sweep, folder=results / sweep)


def find_study(sweep: str, runs: Path = RUNS, results: Path = RESULTS) -> Study:
    """The collected study, else the published one; raises `UserError` where there is neither."""
    places = (collected(sweep, runs), published(sweep, results))
    for study in places:
        if study.runs.is_file():
            return study
    looked = " nor ".join(str(study.runs) for study in places)
    raise UserError(f"study {sweep!r} is not collected: neither {looked}; first: make figures SWEEP={sweep}")


def header(text: str) -> dict[str, str]:
    """The opening comment of a study's file by its words: `# Question: ...`, continued on further lines."""
    entries: dict[str, str] = {}
    for line in itertools.takewhile(lambda line: line.startswith("# "), text.splitlines()):
        word, colon, rest = line.lstrip("# ").partition(": ")
        starts = bool(colon) and word.isalpha() and word.istitle()
        key = word if starts else next(reversed(entries), "Question")
        entries[key] = f"{entries.get(key, '')} {rest if starts else line.lstrip('# ')}".strip()
    return entries


def read_json(path: Path) -> Any:
    """The content of a study's JSON file; raises `UserError` if it is not there or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is not there; collect the study first") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error.msg} at line {error.lineno})") from None


def read_fits(path: Path) -> dict[str, Any]:
    """What `runs.fits.fit_study` found, and the `answer` in a sentence; `UserError` if the file holds anything else."""
    fits = read_json(path)
    if not (isinstance(fits, dict) and {"answer", "budgets", "claims", "multipliers", "laws", "rates"} <= fits.keys()):
        raise UserError(f"{path}: not the fits of a study as this version writes them: make figures, to fit it again")
    return fits


def method_names(table: pd.DataFrame) -> pd.Series:
    """For each row the name of the curve that it is a point of.

    `<method>[_<variant>]`, the name of the layer's file; where a study has further axes, also the values of those in
    the cell's name, so that arms are never mixed in one fit.
    """
    variant = table["variant"].fillna("").astype(str)
    names = table["method"].astype(str) + variant.where(variant == "", "_" + variant)
    axes = pd.Series(
        [_axes(str(cell), seed) for cell, seed in zip(table["cell"], table["seed"], strict=True)],
        index=table.index,
        dtype=str,
    )
    return names if axes.nunique() < 2 else names + axes.where(axes == "", " " + axes)


def _axes(cell: str, seed: int) -> str:
    """The `<axis>=<value>...` part of `<method>-<size>-<budget>[-<axis>=<value>...]-s<seed>`; values may hold a `-`."""
    head, equals, rest = cell.partition("=")
    return f"{head.rpartition('-')[2]}={rest.removesuffix(f'-s{seed}')}" if equals else ""


def same_arm(reference: str, name: str, names: Sequence[str]) -> str | None:
    """The curve of `reference` at the settings of curve `name`, such as its batch; else without any; None if absent."""
    arm = reference + name.removeprefix(name.partition(" ")[0])
    return next((found for found in (arm, reference) if found in names and found != name), None)


def usable(table: pd.DataFrame) -> pd.Series:
    """Which rows a fit takes: finished cells with a finite loss."""
    loss = pd.to_numeric(table["val_loss"], errors="coerce")
    return (table["status"] == str(Status.DONE)) & np.isfinite(loss)


def planned_record(sweep: str, cell: PlannedCell) -> Record:
    """The record of a cell that has none: dropped by its plan, or still to be run."""
    config, plan = cell.config, cell.plan
    return Record(
        sweep=sweep,
        cell=cell.name,
        status=Status.DROPPED if plan.verdict is Verdict.DROP else Status.PENDING,
        reason=plan.reason,
        fingerprint="",
        science=science(config, data_fingerprint=""),
        method=config.ffn.method,
        variant=config.ffn.variant,
        plan=plan_summary(config, plan),
        params=plan.cost.params,
        flops_per_token=plan.cost.flops,
    )


def plan_summary(config: Config, plan: Plan) -> dict[str, Any]:
    """The plan's numbers, as a record keeps them."""
    ffn = config.ffn
    return {
        "size": config.size.name,
        "data": config.data.corpus_name,
        "steps": plan.steps,
        "tokens": plan.tokens,
        "flops": plan.flops,
        "flops_per_token": plan.cost.flops_per_token,
        "layer_share": plan.cost.layer_share,
        "params_total": plan.cost.params_total,
        "params_active": plan.cost.params_active,
        "tokens_per_param": plan.tokens_per_param,
        "epochs": plan.epochs,
        "warmup_steps": plan.warmup_steps,
        "lr": plan.lr,
        "table_lr": plan.table_lr,
        "d_key": ffn.resolved_d_key(config.size.d_model) if isinstance(ffn, RetrievalConfig) else None,
    }
