"""The folder of an entrant in results/standing: what it is, what was chosen, and the records of all its runs.

For a layer outside peerscale it also has its module and its YAML file, where `find_layers_of` makes them found.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from peerscale.config.schema import load
from peerscale.errors import UserError
from peerscale.files import OURS, PACKAGE, from_checkout, outside_folders, replacing, write_json
from peerscale.plan.cell import Cell
from peerscale.plan.entrant import Losses, Placing, Settings, drive, entrant_files, parse_entrant, read_entrant
from peerscale.plan.plan import Verdict
from peerscale.records.record import Record, Status, differences
from peerscale.records.study import RESULTS, read_json
from peerscale.records.table import read_records, write_records

STANDING = RESULTS / "standing"
"""The table on verse; that of another corpus is beside it, in `standing_<name of the corpus>`."""
ENTRY = "entrant.json"
TIME = "time.json"
"""What `make time` measured: `time_over_reference`, at equal training FLOPs, and how."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An entrant with its runs."""

    name: str
    about: Mapping[str, Any]
    """`entrant`, its declaration; `protocol`, the hash of the rules that it followed; `date`, when this was
    written; `chosen`, settings by budget."""
    records: Sequence[Record]
    time_over_reference: float | None = None
    """Of a step, divided by its FLOPs; None: not measured."""


def table_folder(overrides: Sequence[str]) -> Path:
    """The folder of the table to which rows with these overrides of every cell belong."""
    corpus = load(of_data(overrides)).data.corpus_name
    return STANDING if corpus == "gutenberg" else STANDING.with_name(f"{STANDING.name}_{corpus}")


def of_data(overrides: Sequence[str]) -> list[str]:
    """The overrides that choose the corpus."""
    return [override for override in overrides if override.lstrip("+").startswith(("data=", "data."))]


def write_entry(
    placing: Placing, records: Mapping[str, Record], chosen: Mapping[float, Settings], standing: Path
) -> Path:
    """Write the folder of an entrant in that of a table; returns its path."""
    with replacing(standing / placing.name) as temporary:
        temporary.mkdir()
        write_json(temporary / ENTRY, {
            "entrant": asdict(placing.entrant), "protocol": protocol_hash(),
            "date": date.today().isoformat(),
            "chosen": {f"{budget:g}": settings for budget, settings in chosen.items()},
        })  # fmt: skip
        write_records(temporary, [records[name] for name in sorted(records)])
        for name, path in {**_outside_files(placing), TIME: standing / placing.name / TIME}.items():
            if path.is_file():
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, temporary / name)
    return standing / placing.name


def _outside_files(placing: Placing) -> dict[str, Path]:
    """The module and the YAML files of a layer outside peerscale, by their names in its entry."""
    module = type(load([f"ffn={placing.entrant.layer}"]).ffn).__module__
    files = _outside_yaml(placing.entrant.layer)
    if not (path := Path(str(sys.modules[module].__file__)).resolve()).is_relative_to(PACKAGE):
        files[f"{module.replace('.', '/')}.py"] = path
    return files


def _outside_yaml(layer: str) -> dict[str, Path]:
    """The layer's file in conf/ffn and those that it builds on, without those of peerscale."""
    from omegaconf import OmegaConf

    name = f"conf/ffn/{layer}.yaml"
    if (OURS / name).is_file():
        return {}
    files = {name: next(folder / name for folder in outside_folders() if (folder / name).is_file())}
    tree: Any = OmegaConf.to_container(OmegaConf.load(files[name]))
    for other in tree.get("defaults", ()):
        if isinstance(other, str) and other != "_self_":
            files |= _outside_yaml(other)
    return files


def find_layers_of(folder: Path) -> None:
    """Let the layer's module and YAML file be found in its entry, after those of the current folder."""
    sys.path.append(str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(folder)]))


def read_entries(standing: Path) -> list[Entry]:
    """All entrants of a table, by name."""
    return [entry for path in sorted(standing.glob(f"*/{ENTRY}")) if (entry := read_entry(path.parent))]


def read_entry(folder: Path) -> Entry | None:
    """The entrant in a folder; None if there is none."""
    if not (path := folder / ENTRY).is_file():
        return None
    return Entry(
        name=folder.name, about=read_json(path), records=read_records(folder), time_over_reference=_time(folder / TIME)
    )


def _time(path: Path) -> float | None:
    return read_json(path)["time_over_reference"] if path.is_file() else None


def protocol_hash() -> str:
    """The first digits of the SHA-256 of the protocol."""
    return hashlib.sha256((OURS / "docs" / "standing-table.md").read_bytes()).hexdigest()[:12]


def losses_of(records: Mapping[str, Record]) -> Losses:
    """The loss of each finished record on its own `val_set`."""
    done = {name: record for name, record in records.items() if record.status is Status.DONE}
    return {name: one.evaluation[one.hashed_config["data"]["val_set"]]["loss"] for name, one in done.items()}


def check_entry(name: str, overrides: Sequence[str] = (), standing: Path | None = None) -> int:
    """Check that the records of an entrant are exactly those of the protocol; returns their number.

    Args:
        name: of the entrant. Its declaration is the entry's, which a file in sweeps/standing must not contradict.
        overrides: of every cell, such as `data=code`.
        standing: the folder of the table; None: the one that the overrides choose.

    Raises:
        UserError: it followed another protocol; its file in sweeps/standing says otherwise; runs are missing, of
            another configuration, or not asked for; or the choice is another one.
    """
    path = (standing or table_folder(overrides)) / name
    if (entry := read_entry(path)) is None:
        raise UserError(f"{from_checkout(path)} is not there to be checked; first: make place LAYER={name}")
    find_layers_of(path)
    about = entry.about
    if about["protocol"] != protocol_hash():
        raise UserError(f"{path}: followed the protocol {about['protocol']}, which is now {protocol_hash()}")
    placing = Placing(name, parse_entrant(about["entrant"], f"{path / ENTRY}: "), overrides)
    if name in entrant_files() and (declared := read_entrant(name)) != placing.entrant:
        raise UserError(f"{path}: {ENTRY} is of {placing.entrant}, but its file in sweeps/standing says {declared}")
    records = {record.cell: record for record in entry.records}
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
