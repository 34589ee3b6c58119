"""The record of a cell: one JSON file that says what ran, in which environment, and with which result."""

import fcntl
import json
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from peerscale.errors import UserError
from peerscale.files import checksum, write_text
from peerscale.plan.cell import Cell
from peerscale.plan.plan import Verdict
from peerscale.records.fingerprint import differing_keys, fingerprint, hashed_config

SCHEMA_VERSION = 3
"""Increase this when the fields of a record change their meaning."""

RECORD = "record.json"

CHECKSUM = "checksum"
"""Key of a written record: the SHA-256 of all others. Records from before it was written have none."""

LOCK = "lock"
"""Lock file in a cell's folder, held by the process that runs the cell."""

SET_ASIDE = ".old"
"""Suffix of a cell's folder that was set aside, so that nothing reads it any more."""


class Status(StrEnum):
    RUNNING = "running"
    INTERRUPTED = "interrupted"
    """Started and not ended, but no process is running it. Never written to a cell's folder, which says RUNNING."""
    DONE = "done"
    FAILED = "failed"
    DIVERGED = "diverged"
    DROPPED = "dropped"
    PENDING = "pending"


FAILED = (Status.FAILED, Status.DIVERGED)
"""Statuses of a run that ended without a result."""
ENDED = (Status.DONE, *FAILED)
"""Statuses of a run that ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """The record of one cell. Losses in nats per token, times in seconds, FLOPs by `plan.cost.CONVENTION`."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    schema_version: int = SCHEMA_VERSION
    sweep: str
    cell: str
    status: Status
    reason: str = ""
    """Why the cell failed, diverged or was dropped."""
    method: str
    variant: str
    size: str
    """Name of the size, such as d32."""
    budget: float
    seed: int
    axes: dict[str, Any]
    """Dotted keys and values that, besides the five fields above, distinguish the cell from others of its study."""
    batch_sequences: int
    lr: float
    """Peak rate of this cell."""
    table_lr: float | None
    """Peak rate of the expert tables; None: the layer has none, or they have `lr`."""
    fingerprint: str
    hashed_config: dict[str, Any]
    """The values that the fingerprint hashes, kept so that an error can name the keys that differ."""
    plan: dict[str, Any]
    layer: dict[str, Any]
    """The layer's values in the table of runs (`layers.base.FfnConfig.columns`)."""
    params: dict[str, int]
    flops_per_token: dict[str, int]
    """Training FLOPs per token by component."""
    evaluation: dict[str, dict[str, float]] = field(default_factory=dict)
    """By held-out set: loss, se (over sequences), tokens, bits_per_byte, ppl."""
    sequence_losses: list[float] = field(default_factory=list)
    """Mean loss of each sequence of the `val_set`, batch by batch (`stats.comparison.sequence_losses` sorts them)."""
    router: dict[str, float] = field(default_factory=dict)
    """expert_usage, unevenness, and usage_tokens, the number of tokens that they were counted over."""
    timing: dict[str, float] = field(default_factory=dict)
    """wall_s of training, evaluation_s, tokens_per_s, flops_per_s."""
    environment: dict[str, Any] = field(default_factory=dict)
    """Hardware, versions, commit, kernel, threads; recorded, but not hashed."""
    bit_exact: bool = True
    """False if the cell was resumed on another machine, thread count, kernel or torch version."""
    traceback: str = ""


_RECORD = TypeAdapter(Record)


def new_record(cell: Cell, status: Status, data_fingerprint: str, **fields: Any) -> Record:
    """The record of a cell that has no results yet; `fields` are further fields of the record."""
    config, plan, ffn = cell.config, cell.plan, cell.config.ffn
    hashed = hashed_config(config, plan, data_fingerprint)
    of_plan = ("steps", "tokens", "flops", "tokens_per_param", "epochs", "warmup_steps")
    of_cost = ("flops_per_token", "layer_share", "params_total", "params_active")
    return Record(
        sweep=cell.sweep, cell=cell.name, status=status, method=ffn.method, variant=ffn.variant,
        size=config.size_name, budget=config.budget, seed=config.seed, axes=cell.axes,
        batch_sequences=config.batch_sequences, lr=plan.lr, table_lr=plan.table_lr,
        fingerprint=fingerprint(hashed), hashed_config=hashed,
        plan={
            "data": config.data.corpus_name,
            **{name: getattr(plan, name) for name in of_plan}, **{name: getattr(plan.cost, name) for name in of_cost},
        },
        layer=ffn.columns(config.d_model), params=plan.cost.params, flops_per_token=plan.cost.flops, **fields,
    )  # fmt: skip


def planned_record(cell: Cell) -> Record:
    """A record for a cell that has none yet: either dropped by its plan, or pending."""
    status = Status.DROPPED if cell.plan.verdict is Verdict.DROP else Status.PENDING
    return replace(new_record(cell, status, ""), reason=cell.plan.reason, fingerprint="")


def differences(cell: Cell, record: Record, data_fingerprint: str | None) -> list[str]:
    """The keys in which a record differs from the configuration of this cell, as `differing_keys` writes them.

    If the corpus is not prepared (`data_fingerprint` is None), the record is assumed to have the right corpus.
    """
    known = record.hashed_config.get("data_fingerprint") if data_fingerprint is None else data_fingerprint
    wanted = json.loads(json.dumps(hashed_config(cell.config, cell.plan, str(known))))
    if fingerprint(wanted) == record.fingerprint:
        return []
    return differing_keys(record.hashed_config, wanted) or ["fingerprint only"]


def write_record(folder: Path, record: Record) -> None:
    """Write `record.json` atomically."""
    write_text(folder / RECORD, json.dumps(record_tree(record), indent=1) + "\n")


def read_record(folder: Path) -> Record | None:
    """The record in a cell's folder, or None if there is none.

    Raises:
        UserError: the file is not a record or has another schema version; the message says how to go on without it.
    """
    path = folder / RECORD
    try:
        return parse_record(json.loads(path.read_bytes()), str(path))
    except FileNotFoundError:
        return None
    except UserError as error:
        problem = str(error)
    except ValueError as error:
        problem = f"{path}: not JSON ({error})"
    raise UserError(f"{problem}; to go on without it: {set_aside(folder)}")


def read_cell(folder: Path) -> Record | None:
    """The record in a cell's folder; RUNNING becomes INTERRUPTED if no process is running the cell."""
    record = read_record(folder)
    if record is not None and record.status is Status.RUNNING and not is_held(folder):
        return replace(record, status=Status.INTERRUPTED)
    return record


def is_held(folder: Path) -> bool:
    """Whether a process is running the cell of this folder."""
    try:
        with (folder / LOCK).open("rb") as file:  # a reader needs no right to write here, unlike the holder's FileLock
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is no lock file
        return False
    return False


def cell_folders(study: Path) -> list[Path]:
    """The folders in a study's folder that may hold a cell, without those set aside."""
    folders = sorted(study.iterdir()) if study.is_dir() else []
    return [folder for folder in folders if folder.is_dir() and not folder.name.endswith(SET_ASIDE)]


def set_aside(folder: Path) -> str:
    """The command that sets a cell's folder aside, so that nothing reads it any more."""
    return f"mv '{folder}' '{folder}{SET_ASIDE}'"


def record_tree(record: Record) -> dict[str, Any]:
    """The JSON of a record, with the checksum of its values."""
    tree = json.loads(json.dumps(asdict(record)))
    return {**tree, CHECKSUM: checksum(tree)}


def parse_record(tree: Any, where: str) -> Record:
    """A record from its JSON; raises `UserError`, which names `where`."""
    version = tree.get("schema_version") if isinstance(tree, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(f"{where}: schema version {version}, but this peerscale reads version {SCHEMA_VERSION}")
    values = {key: value for key, value in tree.items() if key != CHECKSUM}
    if CHECKSUM in tree and tree[CHECKSUM] != checksum(values):
        raise UserError(f"{where}: damaged, or changed by hand: its values are not those of its checksum")
    try:
        return _RECORD.validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
