"""A study as it might be found on disk: five methods, two budgets, five sizes, known minima, and cells gone wrong."""

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peerscale.config.schema import Config, DataConfig, OptimConfig, TrackingConfig, TrainerConfig
from peerscale.layers.dense import DenseConfig
from peerscale.layers.moe import MoeConfig
from peerscale.layers.peer import PeerConfig
from peerscale.layers.pkm import PkmConfig
from peerscale.plan.plan import Plan, plan
from peerscale.records.record import Record, Status, new_record, write_record
from peerscale.stats import collection
from programs import program

SWEEP = "synthetic"
SEQUENCES, CONTEXT = 512, 64
METHODS: dict[str, Any] = {
    "dense": DenseConfig(),
    "moe": MoeConfig(),
    "moe_token_choice": MoeConfig(variant="token_choice", routing="token_choice"),
    "pkm": PkmConfig(n_experts=4096, n_heads=4, top_k=32),
    "peer": PeerConfig(n_experts=4096, n_heads=4, top_k=16),
}
GRID = {1e11: (8, 12, 16, 24, 32), 3e11: (12, 16, 24, 32, 48)}
LOSS = {1e11: 5.05, 3e11: 4.72}
"""Dense loss at the compute optimum."""
OFFSET = {
    1e11: {"dense": 0.0, "moe": -0.06, "moe_token_choice": -0.05, "pkm": -0.07, "peer": -0.11},
    3e11: {"dense": 0.0, "moe": -0.03, "moe_token_choice": -0.025, "pkm": -0.02, "peer": 0.006},
}
"""Loss at the optimum minus dense's: PEER leads at the first budget and does not at the second."""
CURVATURE = 0.9
"""Nats per squared decade of FLOPs per token."""
WRONG = {
    "moe-d24-3e11-s0": Status.FAILED,
    "peer-d48-3e11-s0": Status.DIVERGED,
    "pkm-d8-1e11-s0": Status.DROPPED,
}


@dataclass(frozen=True)
class SyntheticCell:
    sweep: str
    name: str
    axes: dict[str, Any]
    method: str
    config: Config
    plan: Plan


@functools.cache
def cells() -> list[SyntheticCell]:
    """The plan of the study."""
    found = []
    for method, ffn in METHODS.items():
        for budget, widths in GRID.items():
            for width in widths:
                config = Config(
                    d_model=width,
                    ffn=ffn,
                    data=DataConfig(
                        source="gutenberg", evaluation={"validation": SEQUENCES * CONTEXT, "speeches": 1024}
                    ),
                    optim=OptimConfig(lr=6e-3, table_lr=6e-3 if ffn.method in ("pkm", "peer") else None),
                    trainer=TrainerConfig(),
                    tracking=TrackingConfig(),
                    budget=budget,
                )
                name = f"{method}-d{width}-{budget:.0e}-s0".replace("e+", "e")
                train = 4000 if WRONG.get(name) is Status.DROPPED else 10**9
                sets = {"train": train, "validation": 10**9, "speeches": 10**9}
                planned = plan(config, set_tokens=sets)
                found.append(SyntheticCell(SWEEP, name, {}, method, config, planned))
    return found


@functools.cache
def optimum(budget: float) -> float:
    """FLOPs per token at every method's minimum: the middle of dense's sizes, in the logarithm."""
    sizes = [c.plan.cost.flops_per_token for c in cells() if c.method == "dense" and c.config.budget == budget]
    return float(np.sqrt(min(sizes) * max(sizes)))


@functools.cache
def records() -> list[Record]:
    """Records of the cells that were started; the dropped one has none."""
    rng = np.random.default_rng(7)
    difficulty = rng.normal(0, 0.5, SEQUENCES)  # common to all runs, and most of a loss's uncertainty
    return [_record(cell, difficulty, rng) for cell in cells() if WRONG.get(cell.name) is not Status.DROPPED]


def _record(cell: SyntheticCell, difficulty: np.ndarray, rng: np.random.Generator) -> Record:
    config, planned = cell.config, cell.plan
    environment = {"kernel": "native", "n_threads": 1, "git_commit": "0123456789ab"}
    status = WRONG.get(cell.name, Status.DONE)
    record = new_record(cell, status, "0123456789abcdef", environment=environment)
    if status is Status.FAILED:
        return replace(record, reason="RuntimeError: out of memory", traceback="Traceback ...")
    if status is Status.DIVERGED:
        return replace(record, reason="the training loss is nan at step 40")
    offset = np.log10(planned.cost.flops_per_token / optimum(config.budget))
    mean = LOSS[config.budget] + OFFSET[config.budget][cell.method] + CURVATURE * offset**2 + rng.normal(0, 0.004)
    losses = np.round(mean + difficulty + rng.normal(0, 0.05, SEQUENCES), 5)
    loss, se = float(losses.mean()), float(losses.std(ddof=1) / np.sqrt(SEQUENCES))
    sets = {
        "loss": loss,
        "se": se,
        "tokens": SEQUENCES * CONTEXT,
        "bits_per_byte": loss / 2.6,
        "ppl": float(np.exp(loss)),
    }
    return replace(
        record,
        evaluation={"validation": sets, "speeches": {**sets, "ppl": 1.3 * sets["ppl"]}},
        sequence_losses=losses.tolist(),
        router={} if cell.method == "dense" else {"expert_usage": 0.99, "unevenness": 0.4, "usage_tokens": 32768},
        timing={"wall_s": 100.0, "evaluation_s": 5.0, "tokens_per_s": 2e4, "flops_per_s": 5e9},
    )


def shared_curvature(losses: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, tuple[float, float, float]]:
    """(a, b, c) of a + b z + c z^2, z = log10 x, for each method's (x, losses): one c for all, by least squares."""
    rows, targets = [], []
    for i, (x, y) in enumerate(losses.values()):
        for z, loss in zip(np.log10(x), y, strict=True):
            own = np.zeros(2 * len(losses))
            own[2 * i : 2 * i + 2] = 1, z
            rows.append([*own, z * z])
            targets.append(loss)
    (*each, c), *_ = np.linalg.lstsq(np.array(rows), np.array(targets), rcond=1e-14)
    return {name: (each[2 * i], each[2 * i + 1], c) for i, name in enumerate(losses)}


def minimum(coefficients: tuple[float, float, float]) -> tuple[float, float]:
    """x and loss at the minimum of such a parabola."""
    a, b, c = coefficients
    return 10 ** (-b / (2 * c)), a - b**2 / (4 * c)


def write_cells(runs: Path) -> list[Record]:
    """Write the study's cells into `runs` as a sweep would leave them."""
    rng = np.random.default_rng(8)
    found = records()
    for record in found:
        folder = runs / SWEEP / record.cell
        folder.mkdir(parents=True)
        write_record(folder, record)
        if record.status is Status.FAILED:
            continue
        tokens, per_token = record.plan["tokens"], record.plan["flops_per_token"]
        steps = np.arange(20, record.plan["steps"] + 1, 20)
        end = record.evaluation.get("validation", {"loss": 6.0})["loss"]
        share = steps / record.plan["steps"]
        losses = end + (7.6 - end) * np.exp(-9 * share**0.6) + rng.normal(0, 0.02, len(steps))
        rows = [
            {
                "step": int(s),
                "tokens": int(p * tokens),
                "flops": float(p * tokens * per_token),
                "loss": float(x),
                "lr": 1e-3,
            }
            for s, p, x in zip(steps, share, losses, strict=True)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found


@pytest.fixture(scope="session")
def collected_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `runs` folder with the synthetic study, collected; tests leave it as it is."""
    runs = tmp_path_factory.mktemp("synthetic") / "runs"
    write_cells(runs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collection, "planned_cells", lambda sweep, overrides: cells())
        assert program("collect").main([SWEEP, "--runs", str(runs)]) == 0
    return runs
