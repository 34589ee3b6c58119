"""Which records of a study are of its plan, and which are of another configuration or of other cells."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from peerscale.plan.cell import Cell
from peerscale.records.record import Record, differences


def of_the_plan(
    cells: Iterable[Cell], records: Mapping[str, Record], where: Path, data_fingerprint: str | None
) -> tuple[dict[str, Record], list[str]]:
    """The records that match the plan's configuration or are of no cell of the plan; and a notice about the others."""
    differ = {
        cell.name: found
        for cell in cells
        if cell.name in records and (found := differences(cell, records[cell.name], data_fingerprint))
    }
    kept = {name: record for name, record in records.items() if name not in differ}
    if not differ:
        return kept, []
    name, found = next(iter(differ.items()))
    count = f"{len(differ)} cells, {name} among them, have" if len(differ) > 1 else f"{name} has"
    return kept, [f"notice: {where}: {count} another configuration than the plan: {'; '.join(found)}"]


def some(names: Sequence[str]) -> str:
    """The first three names of a list, and `...` if there are more."""
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def further_line(names: Sequence[str]) -> str:
    """One line about cells that have a record but are not in the plan."""
    return f"{len(names)} further cell{'s' * (len(names) > 1)} not in the plan: {some(names)}"
