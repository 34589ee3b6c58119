"""The folder of an entrant in results/standing: what it is, what was chosen, and the records of all its runs."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peerscale.errors import UserError
from peerscale.files import OURS, replacing, write_json
from peerscale.plan.cell import Cell
from peerscale.plan.entrant import Losses, Placing, Settings, drive
from peerscale.plan.plan import Verdict
from peerscale.records.record import Record, Status, differences
from peerscale.records.study import RESULTS, read_json
from peerscale.records.table import read_records, write_records

STANDING = RESULTS / "standing"
ENTRY = "entrant.json"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An entrant with its runs."""

    name: str
    about: Mapping[str, Any]
    """`entrant`, its declaration; `protocol`, the hash of the rules that it followed; `chosen`, settings by budget."""
    records: Sequence[Record]


def write_entry(
    placing: Placing, records: Mapping[str, Record], chosen: Mapping[float, Settings], standing: Path = STANDING
) -> Path:
    """Write the folder of an entrant; returns its path."""
    with replacing(standing / placing.name) as temporary:
        temporary.mkdir()
        write_json(temporary / ENTRY, {
            "entrant": asdict(placing.entrant), "protocol": protocol_hash(),
            "chosen": {f"{budget:g}": settings for budget, settings in chosen.items()},
        })  # fmt: skip
        write_records(temporary, [records[name] for name in sorted(records)])
    return standing / placing.name


def read_entries(standing: Path = STANDING) -> list[Entry]:
    """All entrants, by name."""
    return [
        Entry(name=path.parent.name, about=read_json(path), records=read_records(path.parent))
        for path in sorted(standing.glob(f"*/{ENTRY}"))
    ]


def protocol_hash() -> str:
    """The first digits of the SHA-256 of the protocol."""
    return hashlib.sha256((OURS / "docs" / "standing-table.md").read_bytes()).hexdigest()[:12]


def losses_of(records: Mapping[str, Record]) -> Losses:
    """The loss of each finished record on its own `val_set`."""
    done = {name: record for name, record in records.items() if record.status is Status.DONE}
    return {name: one.evaluation[one.hashed_config["data"]["val_set"]]["loss"] for name, one in done.items()}


def check_entry(placing: Placing, standing: Path = STANDING) -> int:
    """Check that the records of an entrant are exactly those of the protocol; returns their number.

    Raises:
        UserError: runs are missing, of another configuration, or not asked for; or the choice is another one.
    """
    path = standing / placing.name
    about = read_json(path / ENTRY)
    records = {record.cell: record for record in read_records(path)}
    seen: set[str] = set()

    def look_up(cells: Sequence[Cell]) -> Losses:
        for cell in cells:
            if (record := records.get(cell.name)) and (found := differences(cell, record, None)):
                raise UserError(f"{path}: {cell.name} has another configuration: {'; '.join(found)}")
            if record is None and cell.plan.verdict is Verdict.OK:
                raise UserError(f"{path}: {cell.name} is missing, which the protocol asks for")
        seen.update(cell.name for cell in cells)
        return losses_of({cell.name: records[cell.name] for cell in cells if cell.name in records})

    chosen = drive(placing.tuning(), look_up)
    of_budget = {f"{budget:g}": drive(placing.row(budget, chosen), look_up) for budget in map(float, about["chosen"])}
    if further := records.keys() - seen:
        raise UserError(f"{path}: {min(further)} is there, which the protocol does not ask for")
    if json.loads(json.dumps(of_budget)) != about["chosen"]:
        raise UserError(f"{path}: {ENTRY} says {about['chosen']}, but its runs choose {of_budget}")
    return len(seen)
