"""Side-by-side timing, and the machine's own limits to compare with; torch only where it is needed."""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd

from peerscale.files import write_text


def in_turns(steps: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, one of each in turn so that what disturbs the machine disturbs all; two warm up first."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return {name: values[2:] for name, values in seconds.items()}


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, least and most, as columns of a table."""
    return {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds)}


def matrix_product() -> tuple[Callable[[], object], float]:
    """A product of two fp32 matrices of 1024 x 1024, and its FLOPs: the rate that a training step cannot pass."""
    import torch

    a, b, out = torch.randn(1024, 1024), torch.randn(1024, 1024), torch.empty(1024, 1024)
    return lambda: torch.mm(a, b, out=out), 2.0 * 1024**3


def random_row_bytes_per_s(width: int, repeats: int = 5) -> float:
    """At which rate the sums of random rows, `width` fp32 numbers each, of a table of 1 GB are read."""
    import torch
    import torch.nn.functional as F

    n_rows = 2**28 // width
    table, rows = torch.randn(n_rows, width), torch.randint(n_rows, (4096, 64))
    seconds = in_turns({"rows": lambda: F.embedding_bag(rows, table, mode="sum")}, repeats)["rows"]
    return rows.numel() * width * 4 / statistics.median(seconds)


def write_table(path: Path, rows: list[dict[str, object]]) -> None:
    """A CSV with a column for each key."""
    write_text(path, pd.DataFrame(rows).to_csv(index=False, float_format="%.6g"))
