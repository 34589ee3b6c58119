"""The record of a cell: one JSON file that says what ran, on what, and what came of it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from peerscale.config import Config, to_dict
from peerscale.errors import UserError
from peerscale.files import write_text
from peerscale.plan import Plan

if TYPE_CHECKING:
    from peerscale.cells import Cell

SCHEMA_VERSION = 2
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
    "data.directory", "data.name", "data.path", "data.held_out", "data.train_tokens", "data.max_epochs",
)  # fmt: skip
"""Keys of the configuration that say how and where a cell runs and what is kept of it, not what its result is."""

NAMES = (
    "ffn.class", "ffn.variant", "ffn.params_of.variant", "data.source", "data.max_documents",
    "optim.lr_rule", "optim.lr_law", "optim.lr_factor",
)  # fmt: skip
"""Keys that are not hashed, since what they stand for is: the layer's settings, the corpus's tokens, the rates."""

ADDED_LATER: dict[str, Any] = {
    "routing_group_sequences": None, "ffn.initial_output_scale": 1.0, "optim.warmup_steps": None,
    "optim.decay_fraction": 0.2,
}  # fmt: skip
"""Keys that configurations did not always have, and the values under which cells are as they were before. Hashed only
where they are others, so that finished cells stay finished."""


class Status(StrEnum):
    RUNNING = "running"
    INTERRUPTED = "interrupted"
    """Begun, not ended, and run by no process now. Never in a cell's folder, where it reads RUNNING."""
    DONE = "done"
    FAILED = "failed"
    DIVERGED = "diverged"
    DROPPED = "dropped"
    PENDING = "pending"


FAILED = (Status.FAILED, Status.DIVERGED)
"""How a run ends without a result."""
ENDED = (Status.DONE, *FAILED)
"""How a run ends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One cell. Losses in nats per token, times in seconds, FLOPs by `accounting.CONVENTION`."""

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
    """Its name, such as d32."""
    budget: float
    seed: int
    axes: dict[str, Any]
    """Dotted keys, and their values, besides the five above that tell the cell from others of its study."""
    batch_sequences: int
    lr: float
    """Peak rate at this width."""
    table_lr: float | None
    """The same of the expert tables; None: the layer has none."""
    fingerprint: str
    hashed_config: dict[str, Any]
    """What the fingerprint hashes, kept so that a refused run can name the keys that differ."""
    plan: dict[str, Any]
    layer: dict[str, Any]
    """What the layer tells of itself, for the table of runs (`layers.base.FfnConfig.columns`)."""
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


def new_record(cell: "Cell", status: Status, data_fingerprint: str, **fields: Any) -> Record:
    """The record of a cell before anything came of it, with `fields` besides."""
    config, plan, ffn = cell.config, cell.plan, cell.config.ffn
    hashed = hashed_config(config, plan, data_fingerprint)
    of_plan = ("steps", "tokens", "flops", "tokens_per_param", "epochs", "warmup_steps")
    of_cost = ("flops_per_token", "layer_share", "params_total", "params_active")
    return Record(
        sweep=cell.sweep, cell=cell.name, status=status, method=ffn.method, variant=ffn.variant,
        size=config.size.name, budget=config.budget, seed=config.seed, axes=cell.axes,
        batch_sequences=config.batch_sequences, lr=plan.lr, table_lr=plan.table_lr,
        fingerprint=fingerprint(hashed), hashed_config=hashed,
        plan={
            "data": config.data.corpus_name,
            **{name: getattr(plan, name) for name in of_plan}, **{name: getattr(plan.cost, name) for name in of_cost},
        },
        layer=ffn.columns(config.size.d_model), params=plan.cost.params, flops_per_token=plan.cost.flops, **fields,
    )  # fmt: skip


def hashed_config(config: Config, plan: Plan, data_fingerprint: str) -> dict[str, Any]:
    """What determines the result, as resolved values: configuration, rates of this width, tokens, and the recipe."""
    tree = to_dict(config)
    tree["routing_group_sequences"] = config.routing_group_sequences if config.n_routing_groups > 1 else None
    for key in (*NOT_HASHED, *NAMES):
        remove_key(tree, key)
    for key, usual in ADDED_LATER.items():
        remove_key(tree, key, usual)
    tree["optim"] |= {"lr": plan.lr, "table_lr": plan.table_lr}
    tree["data"]["evaluation"] = {name: tokens for name, tokens in tree["data"]["evaluation"].items() if tokens}
    tree["replaced"] = list(config.replaced_blocks)
    # Expert tables read from bf16 copies are a second recipe; without them nothing changed.
    copied = config.precision == "bf16" and config.ffn.copied_parameters(config.surroundings) > 0
    return {**tree, "data_fingerprint": data_fingerprint, "recipe_version": RECIPE_VERSION + copied}


def remove_key(tree: dict[str, Any], key: str, *only: Any) -> None:
    """Take a dotted key out, if it is there and, with `only`, has that value."""
    *sections, name = key.split(".")
    for section in sections:
        tree = tree.get(section, {})
    if name in tree and (not only or tree[name] == only[0]):
        del tree[name]


def fingerprint(hashed: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of the SHA-256 of the canonical JSON."""
    return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()[:16]


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


def differences(cell: "Cell", record: Record, data_fingerprint: str | None) -> list[str]:
    """Where a record is not of this cell: keys as `differing_keys` gives them.

    Where the corpus is not prepared and `data_fingerprint` is None, that of the record is taken for the right one.
    """
    known = record.hashed_config.get("data_fingerprint") if data_fingerprint is None else data_fingerprint
    wanted = json.loads(json.dumps(hashed_config(cell.config, cell.plan, str(known))))
    if fingerprint(wanted) == record.fingerprint:
        return []
    return differing_keys(record.hashed_config, wanted) or ["fingerprint only"]


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
        return parse_record(json.loads(path.read_bytes()), str(path))
    except FileNotFoundError:
        return None
    except UserError as error:
        problem = str(error)
    except ValueError as error:
        problem = f"{path}: not JSON ({error})"
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
    if version == 1:
        raise UserError(f"{where}: schema version 1, of an earlier peerscale; to convert all records: make convert")
    if version != SCHEMA_VERSION:
        raise UserError(f"{where}: schema version {version}, but this peerscale reads version {SCHEMA_VERSION}")
    try:
        return _RECORD.validate_python(tree)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
