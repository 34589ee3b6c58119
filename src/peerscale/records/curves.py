"""Training curves: the metrics that a cell logs, and the shortened curves of a study."""

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from peerscale.errors import UserError

METRICS = "metrics.jsonl"

CURVES = ("cell", "step", "tokens", "flops", "loss")
"""Columns of a study's training curves."""

CRC = "crc32"
"""Key of a row of metrics: the checksum of the others."""

METRIC = CURVES[1:]
"""Numbers that every row of metrics has."""


def row_line(row: Mapping[Any, Any]) -> str:
    """A row of metrics as a line of `metrics.jsonl`, with a checksum of its values."""
    return json.dumps({**row, CRC: zlib.crc32(json.dumps(row).encode())}) + "\n"


def parse_row(line: bytes) -> dict[str, Any] | None:
    """The row of metrics in a line; None if it is damaged or cut off. Rows from before checksums have none."""
    try:
        row = json.loads(line)
        written = row.pop(CRC, None)
        if written in (None, zlib.crc32(json.dumps(row).encode())):
            return row if all(isinstance(row[key], int | float) for key in METRIC) else None
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    return None


def read_metrics(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of a cell's `metrics.jsonl`; a last line that a crash cut off is left out.

    Raises:
        UserError: any other line is not a row of metrics.
    """
    path = folder / METRICS
    if not path.is_file():
        return
    content = path.read_bytes()
    lines = content.splitlines()
    with_checksum = [f'"{CRC}"'.encode() in line for line in lines]
    for number, line in enumerate(lines, 1):
        # All rows have a checksum, or, in a file from before, none: the key itself may be what is damaged.
        if with_checksum[number - 1] == any(with_checksum) and (row := parse_row(line)):
            yield row
            continue
        if number < len(lines) or content.endswith(b"\n"):
            raise UserError(f"{path}:{number}: not a row of metrics (a JSON object with {', '.join(METRIC)})")


def curves_table(folders: Iterable[Path], *, points: int = 50) -> pd.DataFrame:
    """Training curves, reduced to `points` rows per cell by averaging over steps: cell, step, tokens, flops, loss.

    Rows are grouped from the last one backwards, so that the end of a curve is not an average of fewer steps.
    """
    frames = []
    for folder in folders:
        rows = pd.DataFrame(read_metrics(folder))
        if rows.empty:
            continue
        stride = -(-len(rows) // points)
        steps, group = rows["step"].diff().fillna(rows["step"]), (rows.index - len(rows)) // stride
        thinned = rows.groupby(group)[["step", "tokens", "flops"]].last()
        thinned["loss"] = (rows["loss"] * steps).groupby(group).sum() / steps.groupby(group).sum()
        thinned.insert(0, "cell", folder.name)
        frames.append(thinned)
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=list(CURVES))
