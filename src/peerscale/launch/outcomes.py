"""The outcomes of a study's cells: those run here, in runs/, and those published, in results/."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from peerscale.errors import UserError
from peerscale.files import ROOT
from peerscale.plan.cells import Cell, check_same
from peerscale.plan.plan import Verdict
from peerscale.records.matching import of_the_plan
from peerscale.records.record import ENDED, Record, Status, cell_folders, read_cell
from peerscale.records.study import Study, published
from peerscale.records.table import read_records


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The outcome of one cell."""

    record: Record | None = None
    """The record that counts; None if the cell was never run, or is refused."""
    published: bool = False
    """Whether that record is the published one."""
    refused: str = ""
    """Why the contents of the cell's folder cannot be read or continued, and what to do about it."""

    @property
    def done(self) -> bool:
        return self.record is not None and self.record.status is Status.DONE

    @property
    def done_published(self) -> bool:
        return self.done and self.published


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcomes:
    """The outcomes of a study's cells."""

    planned: dict[str, Outcome]
    """By name of the cell, in the order of the plan."""
    further: dict[str, Outcome]
    """Cells that are not in the plan, such as those made with other overrides."""
    notices: list[str] = field(default_factory=list)
    """Published cells that do not count, and why."""


def outcomes(cells: Sequence[Cell], study: Study, data_fingerprint: str | None) -> Outcomes:
    """Look up every cell of a plan in its folder and among the published ones.

    Args:
        cells: the plan.
        study: the published form of the study, which may not exist.
        data_fingerprint: of the prepared corpus; None if it is not prepared; then corpora are not compared.
    """
    plan = {cell.name: cell for cell in cells}
    here = cells[0].folder.parent
    counting, notices = of_the_plan(cells, read_published(study), study.folder, data_fingerprint)
    names = dict.fromkeys([*plan, *(folder.name for folder in cell_folders(here)), *counting])
    found = {name: _outcome(here / name, plan.get(name), counting.get(name), data_fingerprint) for name in names}
    return Outcomes(
        planned={name: found[name] for name in plan},
        further={name: it for name, it in found.items() if name not in plan and (it.record or it.refused)},
        notices=notices,
    )


def _outcome(folder: Path, cell: Cell | None, published: Record | None, data_fingerprint: str | None) -> Outcome:
    try:
        own = read_cell(folder)
        if own is not None and cell is not None:
            check_same(cell, own, data_fingerprint)
    except UserError as error:
        return Outcome(refused=str(error))
    if own is not None and own.cell != folder.name:  # a renamed folder is a cell that was set aside
        own = None
    record = which_counts(own, published)
    return Outcome(record=record, published=record is not None and record is published)


def which_counts(own: Record | None, published: Record | None) -> Record | None:
    """The record of a cell that counts: a finished one if there is any, and otherwise this machine's own."""
    found = [record for record in (own, published) if record is not None]
    return next((record for record in found if record.status is Status.DONE), found[0] if found else None)


def read_published(study: Study) -> dict[str, Record]:
    """The published cells that have ended, by name; none if the study, or its records, are not published.

    Pending and dropped cells are left out, since the plan decides about them.
    """
    records = read_records(study.folder) if study.records.is_file() else []
    return {record.cell: record for record in records if record.status in ENDED}


def published_study(sweep: str, results: str | Path) -> Study:
    """A study as published in `results`, a folder relative to the checkout; raises `UserError` if it is not there."""
    study = published(sweep, ROOT / results)
    if not study.records.is_file():
        raise UserError(f"no published cells to count as done: {study.records} is not there")
    return study


def published_as_done(cells: Sequence[Cell], study: Study, data_fingerprint: str) -> set[str]:
    """The cells of a plan that are finished in a published study, in the plan's configuration."""
    same, notices = of_the_plan(cells, read_published(study), study.folder, data_fingerprint)
    for notice in notices:
        print(notice, file=sys.stderr)
    names = {cell.name for cell in cells if cell.plan.verdict is Verdict.OK}
    return {name for name, record in same.items() if name in names and record.status is Status.DONE}
