"""Training curves: the metrics that a cell logs, and the shortened curves of a study."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from peerscale.errors import UserError

METRICS = "metrics.jsonl"

CURVES = ("cell", "step", "tokens", "flops", "loss")
"""Columns of a study's training curves."""

METRIC = CURVES[1:]
"""Numbers that every row of metrics has."""


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
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if all(isinstance(row[key], int | float) for key in METRIC):
                yield row
                continue
        except (ValueError, TypeError, KeyError):
            pass
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
