"""The studies of one size, as their sweep files plan them, with made-up losses."""

import functools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from peerscale.plan.cells import Cell, planned_cells
from peerscale.records.record import Record, Status, new_record
from peerscale.records.table import runs_table

SEQUENCES = 256
USED = 32768
"""Tokens that the use of experts is counted over."""


def loss(config: Any) -> float:
    """Nats: each four times as many experts are worth 0.03, BatchNorm 0.004, and 64 active in 4 heads are best."""
    ffn = config.ffn
    if ffn.method not in ("pkm", "peer"):
        return 4.5
    rows = 4.51 - 0.03 * math.log(ffn.n_experts / 256, 4) + (0.01 if ffn.method == "pkm" else 0)
    heads = 0.01 * math.log2(ffn.n_heads / 4) ** 2 + 0.006 * math.log2(ffn.n_heads * ffn.top_k / 64) ** 2
    return rows + heads + (0 if ffn.query_norm else 0.004)


def unevenness(config: Any) -> float:
    return 0.1 * math.log(config.ffn.n_experts, 4) * (1 if config.ffn.query_norm else 1.5)


@functools.cache
def ablation_records(sweep: str) -> list[Record]:
    """Finished records of every cell of `sweeps/<sweep>.yaml`."""
    rng = np.random.default_rng(3)
    difficulty = rng.normal(0, 0.5, SEQUENCES)
    return [_record(cell, difficulty - difficulty.mean(), rng) for cell in planned_cells(sweep)]


def ablation_runs(sweep: str) -> pd.DataFrame:
    """Their table."""
    return runs_table(ablation_records(sweep))


def with_norm_of_one_seed() -> pd.DataFrame:
    """The rows of `experts` that have BatchNorm or are dense, of one seed."""
    runs = ablation_runs("experts")
    return runs[(runs["seed"] == 0) & (runs["query_norm"].astype(str) != "False")]


def _record(cell: Cell, difficulty: np.ndarray, rng: np.random.Generator) -> Record:
    losses = np.round(loss(cell.config) + rng.normal(0, 0.002) + difficulty + rng.normal(0, 0.05, SEQUENCES), 5)
    mean, error = float(losses.mean()), float(losses.std(ddof=1) / math.sqrt(SEQUENCES))
    values = {"loss": mean, "se": error, "bits_per_byte": mean / 2.6, "ppl": math.exp(mean)}
    routed = {} if cell.config.ffn.method not in ("pkm", "peer") else {
        "expert_usage": 0.9, "unevenness": unevenness(cell.config), "usage_tokens": USED,
    }  # fmt: skip
    return replace(
        new_record(cell, Status.DONE, ""),
        evaluation={cell.config.data.val_set: values, "speeches": {**values, "ppl": 1.3 * values["ppl"]}},
        sequence_losses=losses.tolist(),
        router=routed,
        environment={"kernel": "fused", "n_threads": 1, "git_commit": "0123456789ab"},
        timing={"wall_s": 100.0, "tokens_per_s": 2e4, "flops_per_s": 5e9},
    )
