"""What became of planned cells, from the records in their folders."""

from collections.abc import Sequence
from dataclasses import dataclass

from peerscale.data.store import read_manifest
from peerscale.errors import UserError
from peerscale.plan.cell import Cell
from peerscale.plan.plan import Verdict
from peerscale.records.record import Record, Status, differences, read_cell, set_aside

FINISHED = (Status.DONE, Status.DIVERGED, Status.DROPPED)
"""Cells that a sweep does not run again. A diverged cell would diverge again; see `how_to_rerun`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of one cell."""

    cell: Cell
    status: Status
    """That of its record, RUNNING only while a process runs it; PENDING if it has none; or DROPPED."""
    record: Record | None = None
    refused: str = ""
    """Why the contents of the cell's folder cannot be read or continued, and what to do about it."""


def outcome(cell: Cell, data_fingerprint: str | None) -> Outcome:
    """Look up a cell in its folder; without a `data_fingerprint`, corpora are not compared.

    Raises:
        UserError: the folder holds no readable record, or that of another configuration.
    """
    record = read_cell(cell.folder)
    if record is not None:
        check_same(cell, record, data_fingerprint)
    if cell.plan.verdict is Verdict.DROP and (record is None or record.status is not Status.DONE):
        return Outcome(cell=cell, status=Status.DROPPED)
    return Outcome(cell=cell, status=record.status if record else Status.PENDING, record=record)


def outcomes(cells: Sequence[Cell]) -> list[Outcome]:
    """Look up every cell of a plan; each record is read once."""
    manifest = read_manifest(cells[0].config.data)
    found = []
    for cell in cells:
        try:
            found.append(outcome(cell, manifest.fingerprint if manifest else None))
        except UserError as error:
            status = Status.DROPPED if cell.plan.verdict is Verdict.DROP else Status.PENDING
            found.append(Outcome(cell=cell, status=status, refused=str(error)))
    return found


def check_same(cell: Cell, record: Record, data_fingerprint: str | None) -> None:
    """Raise `UserError` if the record in a cell's folder has another configuration than the cell."""
    if found := differences(cell, record, data_fingerprint):
        raise UserError(
            f"{cell.folder} holds a run of another configuration: {'; '.join(found)}. "
            f"To keep it and go on: {set_aside(cell.folder)}"
        )


def how_to_rerun(cell: Cell, status: Status) -> str:
    """How the user can run a failed or diverged cell again."""
    again = "the same command tries it again"
    return f"to run it again anyway: {set_aside(cell.folder)}" if status is Status.DIVERGED else again
