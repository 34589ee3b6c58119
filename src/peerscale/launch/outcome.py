"""What became of the cells of a plan: each cell's record is read once."""

from collections.abc import Sequence
from dataclasses import dataclass

from peerscale.data.store import read_manifest
from peerscale.errors import UserError
from peerscale.plan.cells import Cell, check_same
from peerscale.plan.plan import Verdict
from peerscale.records.record import Record, Status, read_cell


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of one cell."""

    cell: Cell
    status: Status
    """That of its record, RUNNING only while a process runs it; PENDING if it has none; or DROPPED."""
    record: Record | None = None
    refused: str = ""
    """Why the contents of the cell's folder cannot be read or continued, and what to do about it."""


def outcomes(cells: Sequence[Cell]) -> list[Outcome]:
    """Look up every cell of a plan in its folder; if the corpus is not prepared, corpora are not compared."""
    manifest = read_manifest(cells[0].config.data)
    return [_outcome(cell, manifest.fingerprint if manifest else None) for cell in cells]


def _outcome(cell: Cell, data_fingerprint: str | None) -> Outcome:
    record, refused = None, ""
    try:
        record = read_cell(cell.folder)
        if record is not None:
            check_same(cell, record, data_fingerprint)
    except UserError as error:
        record, refused = None, str(error)
    if cell.plan.verdict is Verdict.DROP and (record is None or record.status is not Status.DONE):
        return Outcome(cell=cell, status=Status.DROPPED)
    return Outcome(cell=cell, status=record.status if record else Status.PENDING, record=record, refused=refused)
