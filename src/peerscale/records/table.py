"""The records of a study, and its table of runs: one row per cell, including failed and dropped cells."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from peerscale.config.study import RATE_FACTOR
from peerscale.errors import UserError
from peerscale.files import ROOT, replacing, write_text
from peerscale.plan.cost import CONVENTION
from peerscale.records.record import Record, cell_folders, parse_record, read_cell, record_tree

NEEDED = (
    "cell", "method", "variant", "size", "seed", "budget", "flops_per_token", "val_loss", "status", "convention",
    "settings", "rate_factor",
)  # fmt: skip
"""Columns that every table of runs must have."""

TEXTS = ("variant", "settings", "reason")
"""Text columns that may be empty."""

LAYER_COLUMNS = (
    "n_experts", "ffn_heads", "top_k", "d_key", "query_norm", "active_experts", "granularity", "capacity_factor",
)  # fmt: skip
"""Columns of every table for a layer's own values (`layers.base.FfnConfig.columns`); a layer may have further ones."""

WHOLE = ("flops_per_token", "flops_per_s")
"""Columns whose names start like components of the FLOPs per token, but which are not components."""


RECORDS = "records.jsonl"
"""One record of a study per line, without the losses of single sequences."""

SEQUENCE_LOSSES = "sequence_losses.npz"
"""The losses of single sequences of every cell of a study, by its name: whole numbers of 1 / `UNITS_PER_NAT`."""

UNITS_PER_NAT = 10_000
"""The fifth decimal of a sequence's loss is noise."""


def read_records(folder: Path) -> list[Record]:
    """Every record of a study, from its folder of cells or from the two files that `write_records` writes."""
    lines = folder / RECORDS
    if not lines.is_file():
        # A renamed folder is a cell that was set aside.
        return [record for cell in cell_folders(folder) if (record := read_cell(cell)) and record.cell == cell.name]
    try:
        trees = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:  # includes UnicodeDecodeError
        raise UserError(f"{lines}: not one JSON object per line ({error})") from None
    if not trees:
        raise UserError(f"{lines}: no record in it")
    records = [parse_record(tree, f"{lines}:{n}") for n, tree in enumerate(trees, 1)]
    losses = _read_losses(folder / SEQUENCE_LOSSES)
    return [replace(record, sequence_losses=losses.get(record.cell, [])) for record in records]


def to_publish(record: Record) -> Record:
    """The record as the files of a study keep it: without its traceback, which names a machine's folders, and with
    losses of sequences to four decimals, or none if one of them is not finite."""
    losses = [round(loss, 4) for loss in record.sequence_losses]
    return replace(record, sequence_losses=losses if np.isfinite(losses).all() else [], traceback="")


def write_records(folder: Path, records: Iterable[Record]) -> None:
    """Write the records of a study to a folder, as `to_publish` makes them."""
    published = [to_publish(record) for record in records]
    lines = (json.dumps(record_tree(replace(record, sequence_losses=[]))) + "\n" for record in published)
    write_text(folder / RECORDS, "".join(lines))
    losses = {record.cell: np.array(record.sequence_losses) for record in published if record.sequence_losses}
    units = {cell: np.rint(each * UNITS_PER_NAT).astype(np.int32) for cell, each in losses.items()}
    with replacing(folder / SEQUENCE_LOSSES) as temporary:
        np.savez_compressed(temporary, allow_pickle=False, **units)


def _read_losses(path: Path) -> dict[str, list[float]]:
    try:
        with np.load(path) as units:
            return {cell: (units[cell] / UNITS_PER_NAT).tolist() for cell in units.files}
    except Exception as error:  # a damaged archive can raise many types of errors
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read the losses of sequences in {path}: {reason}") from None


def read_runs(path: str | Path) -> pd.DataFrame:
    """The table of a study, from its `runs.csv` or its folder of cells; never drops a row.

    Raises:
        UserError: there is nothing to read.
    """
    path = Path(path)
    path = path if path.is_absolute() or path.exists() else ROOT / path
    csv = path / "runs.csv" if path.is_dir() else path
    if csv.is_file():
        table = read_table(csv, NEEDED, dtype=dict.fromkeys(TEXTS, str))
        return table.fillna({column: "" for column in TEXTS if column in table})
    records = read_records(path)
    if not records:
        raise UserError(f"no runs in {path}: expected cells with a record.json, or runs.csv")
    return runs_table(records)


def read_table(path: Path, columns: Sequence[str] = (), **options: Any) -> pd.DataFrame:
    """A CSV file that has these columns; raises `UserError` if it cannot be read or has not all of them."""
    try:
        table = pd.read_csv(path, **options)
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
        reason = getattr(error, "strerror", None) or str(error).strip().splitlines()[0]
        raise UserError(f"cannot read the table {path}: {reason}") from None
    if missing := [column for column in columns if column not in table.columns]:
        raise UserError(f"{path}: no column {missing[0]!r}; there are: {', '.join(map(str, table.columns))}")
    return table


def runs_table(records: Iterable[Record]) -> pd.DataFrame:
    """Records as a table; docs/runs.md documents the columns."""
    rows = []
    for record in records:
        try:
            rows.append(_row(record))
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"the record of {record.cell} in {record.sweep} is incomplete: {error!r}") from None
    table = pd.DataFrame(rows).fillna(np.nan)
    components = [column for column in table.columns if column.startswith("flops_") and column not in WHOLE]
    return table.fillna(dict.fromkeys(components, 0))


def _row(record: Record) -> dict[str, Any]:
    config, plan = record.hashed_config, record.plan
    settings = {key: value for key, value in record.axes.items() if key != RATE_FACTOR}
    val = record.evaluation.get(config["data"]["val_set"], {})
    row = {
        **{name: getattr(record, name) for name in ("sweep", "cell", "method", "variant", "size", "seed", "budget")},
        "settings": json.dumps(settings) if settings else "",
        "rate_factor": record.axes.get(RATE_FACTOR, 1.0),
        "flops": plan["flops"],
        "flops_per_token": sum(record.flops_per_token.values()),
        **{f"flops_{component}": n for component, n in record.flops_per_token.items()},
        **{name: plan[name] for name in ("layer_share", "tokens", "steps")},
        "batch_sequences": record.batch_sequences,
        "context": config["context"],
        "precision": config["precision"],
        **{name: config["size"][name] for name in ("d_model", "n_layers", "n_heads")},
        "data": plan["data"],
        **{name: config["data"][name] for name in ("val_set", "vocab_size")},
        "params_total": sum(record.params.values()),
        "params_active": plan["params_active"],
        "params_non_embedding": sum(record.params.values()) - record.params["embedding"],
        **dict.fromkeys(LAYER_COLUMNS),
        "lr": record.lr,
        "table_lr": record.table_lr,
        "optimizer": config["optim"]["name"],
        **{name: record.environment.get(name) for name in ("kernel", "n_threads")},
        "val_loss": val.get("loss"),
        "val_loss_se": val.get("se"),
        "val_bits_per_byte": val.get("bits_per_byte"),
        **{f"ppl_{name}": values.get("ppl") for name, values in record.evaluation.items()},
        **{name: record.router.get(name) for name in ("expert_usage", "unevenness", "usage_tokens")},
        **{name: record.timing.get(name) for name in ("wall_s", "tokens_per_s", "flops_per_s")},
        "status": str(record.status),
        "reason": record.reason,
        "convention": CONVENTION,
        "recipe_version": config["recipe_version"],
        "git_commit": record.environment.get("git_commit"),
    }
    if taken := [column for column in record.layer if column in row and column not in LAYER_COLUMNS]:
        raise UserError(f"the layer of {record.cell} has a column {taken[0]!r}, which the table of runs has itself")
    return row | record.layer
