"""A cell's folder as training leaves it, without training, and its rows compared with what a server received."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import wandb
import yaml

from peerscale.config.schema import composed, to_dict
from peerscale.plan.cells import single_cell
from peerscale.records.record import Record, Status, write_record
from peerscale.train.tracking import Tracker, cut_back
from toy_study import record_of
from wandb_server import Run


def row(step: int, loss: float | None = None) -> dict[str, Any]:
    return {
        "step": step,
        "tokens": step * 1024,
        "flops": step * 1024 * 123456,
        "loss": 8 / step**0.1 if loss is None else loss,
        "lr": 0.01,
        "tokens_per_s": 5000.0 + step % 7,
    }


class TrackedCell:
    """`log` rows as a worker would, `killed` at any time and gone on with."""

    def __init__(self, runs: Path, mode: str = "offline", seed: int = 0) -> None:
        overrides = ["ffn=dense", "d_model=8", f"seed={seed}", f"tracking={mode}", f"trainer.runs_directory={runs}"]
        cell = single_cell(composed(overrides))
        self.folder, self.config = cell.folder, to_dict(cell.config)
        self.record: Record = record_of(cell, Status.RUNNING)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.yaml").write_text(yaml.safe_dump(self.config))
        write_record(self.folder, self.record)
        self.tracker: Tracker | None = None

    def log(self, first: int, last: int, **changed: float) -> None:
        """Rows of the steps `first` to `last`; begins or goes on at `first`."""
        if self.tracker is None:
            cut_back(self.folder, first - 1)
            self.tracker = Tracker(self.folder, self.config, self.record)
        for step in range(first, last + 1):
            self.tracker.log(row(step, **changed))

    def kill(self) -> None:
        """The process is gone, and the client's service with it."""
        assert self.tracker is not None
        self.tracker.file.close()
        self.tracker = None
        wandb.teardown(exit_code=1)
        logger = logging.getLogger("wandb")  # whose log files would go with the process
        for handler in logger.handlers[:]:
            logger.removeHandler(handler)
            handler.close()

    def finish(self, status: Status = Status.DONE) -> None:
        assert self.tracker is not None
        evaluation = {"validation": {"loss": 4.5, "se": 0.01}}
        self.record = replace(self.record, status=status, evaluation=evaluation, signals=self.tracker.signals)
        write_record(self.folder, self.record)
        self.tracker.finish(self.record)
        self.tracker = None

    def assert_arrived(self, run: Run) -> None:
        """The server's run holds every row once, in order, and configuration and results."""
        rows = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        expected = [
            {
                "_step": r["step"],
                "tokens": r["tokens"],
                "flops": r["flops"],
                **{f"train/{key}": r[key] for key in ("loss", "lr", "tokens_per_s")},
            }
            for r in rows
        ]
        own = ("_timestamp", "_runtime")
        assert [{key: value for key, value in r.items() if key not in own} for r in run.history] == expected
        config = {key: value for key, value in run.config.items() if key not in ("_wandb", "derived")}
        told = json.loads(json.dumps(self.config))
        assert not told["data"].pop("held_out"), "W&B leaves out what is empty"
        assert config == told
        assert run.summary["status"] == str(self.record.status)
        assert run.exit_code == (0 if self.record.status is Status.DONE else 1)
        for name, values in self.record.evaluation.items():
            assert {key: run.summary[f"{name}/{key}"] for key in values} == values
