"""Small cells: their budgets, their training, whole or broken off, and what they end with."""

import functools
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from peerscale.config.schema import composed, load
from peerscale.plan.cells import Cell, single_cell
from peerscale.plan.cost import cost
from peerscale.records.curves import read_metrics
from peerscale.records.record import Record, Status, read_record
from peerscale.train.module import LanguageModel
from peerscale.train.run import run_cell

EXPLODES = ["optim.lr_rule=constant", "optim.lr=1e30", "optim.warmup_fraction=0"]


@functools.cache
def flops_per_step(*overrides: str) -> int:
    config = load([*overrides, "budget=1e9"])
    return cost(config).flops_per_token * config.tokens_per_step


def budget(overrides: list[str], steps: int) -> str:
    """The override that plans `steps` steps."""
    of_model = [word for word in overrides if not word.startswith(("trainer.", "tracking", "optim"))]
    return f"budget={flops_per_step(*of_model) * steps:.10g}"


@functools.cache
def planned(*overrides: str) -> Cell:
    return single_cell(composed(overrides))


def train(overrides: list[str]) -> tuple[Status, Record]:
    cell = planned(*overrides)
    status = run_cell(cell)
    record = read_record(cell.folder)
    assert record is not None
    return status, record


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    newest = max((folder / "checkpoints").glob("*.ckpt"))
    return torch.load(newest, weights_only=True)["state_dict"]


def wandb_log(folder: Path) -> str:
    """What the offline W&B run of a cell holds, by W&B's own reader."""
    (run,) = (folder / "wandb").glob("offline-run-*")
    command = [Path(sys.executable).parent / "wandb", "leet", "inspect", "--json", run]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def assert_tracked(folder: Path) -> None:
    """W&B has the rows of metrics.jsonl."""
    text, rows = wandb_log(folder), list(read_metrics(folder))
    assert rows and all(json.dumps(row["tokens"]) in text and repr(row["loss"])[:8] in text for row in rows)


def break_off(monkeypatch: pytest.MonkeyPatch, call: int, error: BaseException, seconds: float = 0) -> list[int]:
    """Make the `call`-th training step raise `error`, and the others last some seconds; returns the steps called."""
    calls, step = [], LanguageModel.training_step

    def broken(self: LanguageModel, tokens: torch.Tensor, batch_idx: int) -> dict[str, torch.Tensor]:
        calls.append(batch_idx)
        if len(calls) == call:
            raise error
        time.sleep(seconds)
        return step(self, tokens, batch_idx)

    monkeypatch.setattr(LanguageModel, "training_step", broken)
    return calls
