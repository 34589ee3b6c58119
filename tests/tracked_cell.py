"""A cell's folder as training leaves it, without training, and its rows compared with what a server received."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import wandb

from peerscale.config.schema import composed, to_dict
from peerscale.plan.cells import single_cell
from peerscale.records.curves import METRICS
from peerscale.records.record import Record, Status
from peerscale.train.metrics import cut_back
from peerscale.train.tracking import RunLogger, start_tracking
from toy_study import record_of
from wandb_server import Run


def row(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "tokens": step * 1024,
        "flops": step * 1024 * 123456,
        "loss": 8 / step**0.1,
        "lr": 0.01,
        "tokens_per_s": 5000.0 + step % 7,
    }


class TrackedCell:
    """`log` rows as a worker would, `killed` at any time and gone on with."""

    def __init__(self, runs: Path, mode: str = "offline", seed: int = 0) -> None:
        overrides = ["ffn=dense", "d_model=8", f"seed={seed}", f"tracking={mode}", f"trainer.runs_directory={runs}"]
        cell = single_cell(composed(overrides))
        self.folder, self.config, self.plan = cell.folder, cell.config, cell.plan
        self.record: Record = record_of(cell, Status.RUNNING)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tracker: RunLogger | None = None

    def log(self, first: int, last: int) -> None:
        """Rows of the steps `first` to `last`; begins or goes on at `first`."""
        if self.tracker is None:
            cut_back(self.folder, first - 1, self.config, self.plan)
            self.tracker = start_tracking(self.folder, self.config, self.record)
        with (self.folder / METRICS).open("a") as file:
            for step in range(first, last + 1):
                file.write(json.dumps(row(step)) + "\n")
                if self.tracker is not None:
                    self.tracker.log_metrics(row(step), step)

    def kill(self) -> None:
        """The process is gone, and the client's service with it."""
        self.tracker = None
        wandb.teardown(exit_code=1)
        logger = logging.getLogger("wandb")  # whose log files would go with the process
        for handler in logger.handlers[:]:
            logger.removeHandler(handler)
            handler.close()

    def finish(self, status: Status = Status.DONE) -> None:
        evaluation = {"validation": {"loss": 4.5, "se": 0.01}}
        self.record = replace(self.record, status=status, evaluation=evaluation)
        if self.tracker is not None:
            self.tracker.finish(self.record)
        self.tracker = None

    def assert_arrived(self, run: Run) -> None:
        """The server's run holds every row once, in order, and configuration and results."""
        rows = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        expected = [
            {
                "_step": r["step"],
                "trainer/global_step": r["step"],
                "tokens": r["tokens"],
                "flops": r["flops"],
                **{f"train/{key}": r[key] for key in ("loss", "lr", "tokens_per_s")},
            }
            for r in rows
        ]
        own = ("_timestamp", "_runtime")
        assert [{key: value for key, value in r.items() if key not in own} for r in run.history] == expected
        config = {key: value for key, value in run.config.items() if key not in ("_wandb", "derived")}
        told = json.loads(json.dumps(to_dict(self.config)))
        assert not told["data"].pop("held_out"), "W&B leaves out what is empty"
        assert config == told
        assert run.summary["status"] == str(self.record.status)
        assert run.exit_code == (0 if self.record.status is Status.DONE else 1)
        for name, values in self.record.evaluation.items():
            assert {key: run.summary[f"{name}/{key}"] for key in values} == values
