"""The record of a cell: one JSON file that says what ran, on what, and what came of it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from peerscale.config import Config, to_dict
from peerscale.errors import UserError
from peerscale.files import write_text

SCHEMA_VERSION = 1
"""Raised when the fields of a record change their meaning."""

RECIPE_VERSION = 1
"""Raised by hand when the numerics of training change, so that old cells are not taken for new ones."""

RECORD = "record.json"

LOCK = "lock"
"""The file in a cell's folder that the process which runs the cell holds."""

SET_ASIDE = ".old"
"""Ending of a cell's folder that nothing reads any more."""

NOT_HASHED = (
    "trainer", "tracking", "min_steps",
    "data.directory", "data.name", "data.path", "data.train_tokens", "data.max_epochs",
)  # fmt: skip
"""Keys of the configuration that say how and where a cell runs and what is kept of it, not what its result is."""


class Status(StrEnum):
    RUNNING = "running"
    INTERRUPTED = "interrupted"
    """Begun, not ended, and run by no process now. Never in a cell's folder, where it reads RUNNING."""
    DONE = "done"
    FAILED = "failed"
    DIVERGED = "diverged"
    DROPPED = "dropped"
    PENDING = "pending"


ENDED = (Status.DONE, Status.FAILED, Status.DIVERGED)
"""How a run ends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One cell. Losses in nats per token, times in seconds, FLOPs by `accounting.CONVENTION`."""

    schema_version: int = SCHEMA_VERSION
    sweep: str
    cell: str
    status: Status
    reason: str = ""
    """Why the cell failed, diverged or was dropped."""
    fingerprint: str
    science: dict[str, Any]
    """What the fingerprint hashes, kept so that a refused run can name the keys that differ."""
    method: str
    variant: str
    plan: dict[str, Any]
    params: dict[str, int]
    flops_per_token: dict[str, int]
    """Training FLOPs per token by component."""
    evaluation: dict[str, dict[str, float]] = field(default_factory=dict)
    """By held-out set: loss, se (over sequences), tokens, bits_per_byte, ppl."""
    sequence_losses: list[float] = field(default_factory=list)
    """Mean loss of each sequence of the `val_set`, in fixed order, for paired comparison."""
    router: dict[str, float] = field(default_factory=dict)
    """expert_usage, unevenness and the usage_tokens that they were counted over."""
    signals: list[str] = field(default_factory=list)
    """What happened during training, each with its step: loss spikes, router collapse, throughput halved."""
    timing: dict[str, float] = field(default_factory=dict)
    """wall_s of training, evaluation_s, tokens_per_s, flops_per_s."""
    environment: dict[str, Any] = field(default_factory=dict)
    """Hardware, versions, commit, kernel, threads: recorded, not hashed."""
    bit_exact: bool = True
    """False if the cell was resumed on another machine, thread count, kernel or torch version."""
    traceback: str = ""


_RECORD = TypeAdapter(Record)


def science(config: Config, data_fingerprint: str) -> dict[str, Any]:
    """What determines the result: the configuration less how and where it runs, the data, and the recipe."""
    tree = to_dict(config)
    for dotted in NOT_HASHED:
        group, _, key = dotted.rpartition(".")
        del (tree[group] if group else tree)[key]
    return {**tree, "data_fingerprint": data_fingerprint, "recipe_version": RECIPE_VERSION}


def fingerprint(science: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of the SHA-256 of the canonical JSON."""
    return hashlib.sha256(json.dumps(science, sort_keys=True).encode()).hexdigest()[:16]


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ, each as `key old -> new`."""
    differences = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            differences += differing_keys(before, after, f"{prefix}{key}.")
        elif before != after:
            differences.append(f"{prefix}{key} {before!r} -> {after!r}")
    return differences


def differences(config: Config, record: Record, data_fingerprint: str | None) -> list[str]:
    """Where a record is not of the cell that `config` describes: keys as `differing_keys` gives them.

    Where the corpus is not prepared and `data_fingerprint` is None, that of the record is taken for the right one.
    """
    known = record.science.get("data_fingerprint") if data_fingerprint is None else data_fingerprint
    wanted = json.loads(json.dumps(science(config, str(known))))
    if fingerprint(wanted) == record.fingerprint:
        return []
    return differing_keys(record.science, wanted) or ["fingerprint only"]


def write_record(folder: Path, record: Record) -> None:
    """Write `record.json` atomically."""
    write_text(folder / RECORD, json.dumps(asdict(record), indent=1) + "\n")


def read_record(folder: Path) -> Record | None:
    """The record in a cell's folder, or None if there is none.

    Raises:
        UserError: the file is no record, or of another schema version; the line says how to go on without it.
    """
    path = folder / RECORD
    try:
        return parse_record(json.loads(path.read_text(encoding="utf-8")), str(path))
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as error:
        problem = f"{path}: not JSON ({error.msg} at line {error.lineno})"
    except UnicodeDecodeError:
        problem = f"{path}: not JSON (not UTF-8)"
    except UserError as error:
        problem = str(error)
    raise UserError(f"{problem}; to go on without it: {set_aside(folder)}")


def read_cell(folder: Path) -> Record | None:
    """The record in a cell's folder; one that says RUNNING though no process has the cell is INTERRUPTED here."""
    record = read_record(folder)
    if record is not None and record.status is Status.RUNNING and not is_held(folder):
        return replace(record, status=Status.INTERRUPTED)
    return record


def is_held(folder: Path) -> bool:
    """Whether a process runs the cell of this folder now."""
    from filelock import FileLock, Timeout

    if not (folder / LOCK).is_file():
        return False
    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except Timeout:
        return True


def cell_folders(study: Path) -> list[Path]:
    """The folders in a study's folder that may hold a cell; not those set aside."""
    folders = sorted(study.iterdir()) if study.is_dir() else []
    return [folder for folder in folders if folder.is_dir() and not folder.name.endswith(SET_ASIDE)]


def set_aside(folder: Path) -> str:
    """The command after which nothing reads this cell's folder any more."""
    return f"mv '{folder}' '{folder}{SET_ASIDE}'"


def parse_record(tree: Any, where: str) -> Record:
    """A record from its JSON; raises `UserError` naming `where`."""
    version = tree.get("schema_version") if isinstance(tree, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(f"{where}: schema version {version}, but this peerscale reads version {SCHEMA_VERSION}")
    known = {f.name for f in fields(Record)}
    if unknown := sorted(tree.keys() - known):
        raise UserError(f"{where}: unknown fields {', '.join(unknown)}")
    try:
        return _RECORD.validate_python(tree)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
