"""The files of a study: where they lie, and its fits."""

import json
from pathlib import Path
from typing import Any

from peerscale.errors import UserError
from peerscale.files import ROOT

RUNS, RESULTS = ROOT / "runs", ROOT / "results"


class StudyFolder:
    """The files of one study: `runs/<sweep>/study/`, or `results/<sweep>/` once published."""

    def __init__(self, sweep: str, folder: Path) -> None:
        self.sweep, self.folder = sweep, folder
        self.runs = folder / "runs.csv"
        """One row per cell, including cells without a result."""
        self.records = folder / "records.jsonl"
        """One record per line, without the losses of single sequences."""
        self.sequence_losses = folder / "sequence_losses.npz"
        """These losses."""
        self.curves = folder / "curves.csv"
        """Shortened training curves."""
        self.fits = folder / "fits.json"
        """All statistics and laws of the study."""
        self.table = folder / "table.md"
        """The closing table, in Markdown."""
        self.csv = folder / "table.csv"
        """Its first part."""
        self.figures = folder / "figures"


def collected(sweep: str, runs: Path = RUNS, corpus: str = "") -> StudyFolder:
    """The study as collected from its cells; its files may not exist.

    On another corpus than its own, such as `data=docs` (`plan.cell_names.corpus_label`), it has another folder.
    """
    return StudyFolder(sweep, runs / sweep / "-".join(filter(None, ("study", corpus))))


def published(sweep: str, results: Path = RESULTS) -> StudyFolder:
    """The study as published; its files may not exist."""
    return StudyFolder(sweep, results / sweep)


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
