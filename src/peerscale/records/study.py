"""The files of a study: where they lie, and its fits."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peerscale.errors import UserError
from peerscale.files import ROOT

RUNS, RESULTS = ROOT / "runs", ROOT / "results"


class _File:
    """A property that gives the path of a file in a study's folder."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, study: "StudyFolder", _: type) -> Path:
        return study.folder / self.name


@dataclass(frozen=True, kw_only=True)
class StudyFolder:
    """The files of one study: `runs/<sweep>/study/`, or `results/<sweep>/` once published."""

    sweep: str
    folder: Path
    runs = _File("runs.csv")
    """One row per cell, including cells without a result."""
    records = _File("records.jsonl")
    """One record per line, without the losses of single sequences."""
    sequence_losses = _File("sequence_losses.npz")
    """These losses."""
    curves = _File("curves.csv")
    """Shortened training curves."""
    fits = _File("fits.json")
    """All statistics and laws of the study."""
    table = _File("table.md")
    """The closing table, in Markdown."""
    csv = _File("table.csv")
    """Its first part."""
    figures = _File("figures")


def collected(sweep: str, runs: Path = RUNS, corpus: str = "") -> StudyFolder:
    """The study as collected from its cells; its files may not exist.

    On another corpus than its own, such as `data=docs` (`plan.cell_names.corpus_label`), it has another folder.
    """
    return StudyFolder(sweep=sweep, folder=runs / sweep / "-".join(filter(None, ("study", corpus))))


def published(sweep: str, results: Path = RESULTS) -> StudyFolder:
    """The study as published; its files may not exist."""
    return StudyFolder(sweep=sweep, folder=results / sweep)


def find_study(sweep: str, runs: Path = RUNS, results: Path = RESULTS) -> StudyFolder:
    """The collected study, or else the published one; raises `UserError` if neither exists."""
    places = (collected(sweep, runs), published(sweep, results))
    for study in places:
        if study.runs.is_file():
            return study
    looked = " nor ".join(str(study.runs) for study in places)
    raise UserError(f"study {sweep!r} is not collected: neither {looked}; first: make figures SWEEP={sweep}")


def read_json(path: Path) -> Any:
    """The content of a study's JSON file; raises `UserError` if it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is not there; collect the study first") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error.msg} at line {error.lineno})") from None
