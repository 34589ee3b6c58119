"""The table of runs: one row per cell, including failed and dropped cells."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from peerscale.errors import UserError
from peerscale.files import ROOT
from peerscale.plan.cost import CONVENTION
from peerscale.records.record import Record, cell_folders, parse_record, read_cell

NEEDED = (
    "cell", "method", "variant", "size", "seed", "budget", "flops_per_token", "val_loss", "status", "convention",
    "axes",
)  # fmt: skip
"""Columns that every table of runs must have."""

TEXTS = ("variant", "axes", "reason")
"""Text columns that may be empty."""

LAYER_COLUMNS = (
    "n_experts", "ffn_heads", "top_k", "d_key", "query_norm", "active_experts", "granularity", "capacity_factor",
)  # fmt: skip
"""Columns for a layer's own values (`layers.base.FfnConfig.columns`)."""

WHOLE = ("flops_per_token", "flops_per_s")
"""Columns whose names start like components of the FLOPs per token, but which are not components."""


def read_records(folder: Path) -> list[Record]:
    """Every record of a study, from its folder of cells or from a published `records.jsonl`."""
    published = folder / "records.jsonl"
    if published.is_file():
        try:
            lines = [json.loads(line) for line in published.read_text(encoding="utf-8").splitlines()]
        except ValueError as error:  # includes UnicodeDecodeError
            raise UserError(f"{published}: not one JSON object per line ({error})") from None
        if not lines:
            raise UserError(f"{published}: no record in it")
        return [parse_record(tree, f"{published}:{n}") for n, tree in enumerate(lines, 1)]
    # A renamed folder is a cell that was set aside.
    return [record for cell in cell_folders(folder) if (record := read_cell(cell)) and record.cell == cell.name]


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
    val = record.evaluation.get(config["data"]["val_set"], {})
    return {
        **{name: getattr(record, name) for name in ("sweep", "cell", "method", "variant", "size", "seed", "budget")},
        "axes": json.dumps(record.axes) if record.axes else "",
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
        **{column: record.layer.get(column) for column in LAYER_COLUMNS},
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
