"""Tables of runs whose losses a test makes up, and the records of their validation sequences."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from peerscale.records.record import Record, Status
from toy_study import settings_text

SIZES = np.array([3e5, 4.8e5, 7.5e5, 1.2e6, 1.9e6])
"""FLOPs per token."""

LADDER = [1e12, 3e12, 1e13, 3e13]
"""Budgets."""


def run(
    method: str,
    budget: float,
    loss: float,
    *,
    x: float = 7.5e5,
    size: str = "",
    seed: int = 0,
    settings: str = "",
    **more: Any,
) -> dict[str, Any]:
    """A row of the table: one finished cell; `settings` are those of its variant, such as `batch_sequences=8`."""
    size = size or f"d{x / 1e4:.0f}"
    cell = "-".join(filter(None, (method, size, f"{budget:g}", settings, f"s{seed}")))
    return {
        "cell": cell, "settings": settings_text(settings), "rate_factor": 1.0,
        "method": method, "variant": "", "size": size, "seed": seed, "budget": budget, "status": "done",
        "flops_per_token": x, "val_loss": loss, "batch_sequences": 16, **more,
    }  # fmt: skip


def bowl(x: float, lowest: float, at: float = 7.5e5, curvature: float = 0.9) -> float:
    return lowest + curvature * float(np.log10(x / at)) ** 2


def curves(
    lowest: Mapping[tuple[str, float], float], *, noise: float = 0.0, rng: int | np.random.Generator = 0,
    seeds: int = 1, seed_sd: float = 0.0, sizes: np.ndarray = SIZES,
) -> pd.DataFrame:  # fmt: skip
    """Parabolas of the given minima by (method, budget); a method may name settings after a blank."""
    draw = np.random.default_rng(rng).normal
    rows = []
    for (name, budget), loss in lowest.items():
        method, _, settings = name.partition(" ")
        for x in sizes * (budget / 1e12) ** 0.5:
            mean = bowl(x, loss, at=7.5e5 * (budget / 1e12) ** 0.5) + noise * draw()
            rows += [run(method, budget, mean + seed_sd * draw(), x=x, seed=s, settings=settings) for s in range(seeds)]
    return pd.DataFrame(rows)


def with_columns(runs: pd.DataFrame) -> pd.DataFrame:
    """The columns of a whole table that the laws ask for."""
    columns = dict.fromkeys(("flops_attention_scores", "flops_attention_values", "table_lr"), 0.0)
    named = dict.fromkeys(("params_active", "params_total"), runs["flops_per_token"] / 6)
    return runs.assign(**columns, **named, tokens=1e7, d_model=64, batch_sequences=16)


def record(cell: str, losses: np.ndarray, status: Status = Status.DONE) -> Record:
    """A record that holds nothing but the losses of validation sequences."""
    return Record(
        sweep="made_up", cell=cell, status=status, fingerprint="", hashed_config={}, method="", variant="", plan={},
        size="d8", budget=1e10, seed=0, axes={}, batch_sequences=16, lr=0.01, table_lr=None, layer={}, params={},
        flops_per_token={}, sequence_losses=[float(loss) for loss in losses],
    )  # fmt: skip


def ladder(gain: float, budgets: list[float], **options: Any) -> pd.DataFrame:
    """Dense's optimum is 40 C^-0.07, and PEER's that of `gain` times the compute."""
    return curves(
        {(m, c): 40 * (g * c) ** -0.07 for m, g in (("dense", 1.0), ("peer", gain)) for c in budgets}, **options
    )


def with_sequences(
    runs: pd.DataFrame, *, own: float = 0.05, n: int = 256
) -> tuple[pd.DataFrame, list[Record], np.ndarray]:
    """The runs with mean losses over sequences, their records, and the losses (runs, sequences)."""
    rng = np.random.default_rng(4)
    difficulty = rng.normal(0, 0.5, n)  # of a text, common to all models
    losses = runs["val_loss"].to_numpy()[:, None] + difficulty + rng.normal(0, own, (len(runs), n))
    records = [record(cell, values) for cell, values in zip(runs["cell"], losses, strict=True)]
    return runs.assign(val_loss=losses.mean(axis=1)), records, losses


def of(found: dict[str, Any], method: str, reference: str, budget: float = 1e12, size: str = "") -> dict[str, Any]:
    """The difference of two methods at a budget."""
    (entry,) = (entry for entry in found["budgets"] if entry["budget"] == budget)
    (one,) = (
        d for d in entry["differences"] if (d["method"], d["reference"], d["size"]) == (method, reference, size)
    )  # fmt: skip
    return one
