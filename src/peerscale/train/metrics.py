"""Training metrics: a row every few steps, in `metrics.jsonl` and Lightning's loggers; runs that diverge end."""

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT

from peerscale.config.schema import Config
from peerscale.files import write_text
from peerscale.plan.plan import Plan
from peerscale.records.curves import METRIC, METRICS
from peerscale.train.evaluation import attach_usage, detach_usage
from peerscale.train.module import LanguageModel


class Diverged(Exception):
    """The training loss is no longer a finite number."""


DIVERGED_AT = "diverged_at"
"""The step at which the loss of a row was not finite, among the metrics that Lightning brings back from processes."""


class MetricsLog(Callback):
    """Logs a row every `log_every_steps` steps; ends a run whose loss is not finite.

    The rows are on disk before a checkpoint and the record of a finished run are, so that none before it can be lost.
    """

    def __init__(self, config: Config, plan: Plan, folder: Path) -> None:
        self.config, self.plan, self.path = config, plan, folder / METRICS
        self.file: TextIO | None = None
        """Open in training, in the process that writes."""
        self.loss_sum, self.loss_count = torch.zeros(()), 0
        self.since, self.since_step = time.perf_counter(), 0
        self.lr = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.since, self.since_step = time.perf_counter(), trainer.global_step
        if trainer.is_global_zero:
            self.file = self.path.open("a", encoding="utf-8")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches:
            return  # a micro-batch within a step
        self.lr = trainer.optimizers[0].param_groups[0]["lr"]  # after the step it is the next step's rate
        # Router health is sampled: only the tokens of a logged step are counted.
        assert isinstance(pl_module, LanguageModel)
        if is_logged(trainer.global_step + 1, self.config, self.plan):
            attach_usage(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LanguageModel) and isinstance(outputs, dict)
        cross_entropy = trainer.strategy.reduce(outputs["cross_entropy"].clone(), reduce_op="mean")
        self.loss_sum = self.loss_sum.to(pl_module.device) + cross_entropy
        self.loss_count += 1
        step = trainer.global_step
        if (batch_idx + 1) % trainer.accumulate_grad_batches or not is_logged(step, self.config, self.plan):
            return
        loss = float(self.loss_sum) / self.loss_count
        seconds, now = time.perf_counter() - self.since, time.perf_counter()
        tokens = step * self.config.tokens_per_step
        row = {
            "step": step,
            "tokens": tokens,
            "flops": tokens * self.plan.cost.flops_per_token,
            "loss": loss,
            "lr": self.lr,
            "tokens_per_s": (step - self.since_step) * self.config.tokens_per_step / seconds,
            **detach_usage(pl_module, trainer),
        }
        if not math.isfinite(loss):
            trainer.callback_metrics.update({DIVERGED_AT: torch.tensor(step), "loss": torch.tensor(loss)})
            trainer.should_stop = True
        elif self.file is not None:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
            for logger in trainer.loggers:
                logger.log_metrics(row, step)
        self.loss_sum, self.loss_count = torch.zeros(()), 0
        self.since, self.since_step = now, step

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.file is not None:
            os.fsync(self.file.fileno())

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.file is not None:
            os.fsync(self.file.fileno())
            self.file.close()
            self.file = None

    def state_dict(self) -> dict[str, Any]:
        return {"loss_sum": self.loss_sum, "loss_count": self.loss_count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loss_sum, self.loss_count = state_dict["loss_sum"], state_dict["loss_count"]


def is_logged(step: int, config: Config, plan: Plan) -> bool:
    """Whether there is a row of metrics after `step`."""
    return step % config.trainer.log_every_steps == 0 or step == plan.steps


def cut_back(folder: Path, step: int, config: Config, plan: Plan) -> None:
    """Remove the rows after `step`, which a resumed run writes again, and damaged ones; a notice tells what is lost."""
    path = folder / METRICS
    rows = filter(None, map(_row, path.read_bytes().splitlines() if path.is_file() else []))
    kept = {row["step"]: row for row in rows if row["step"] <= step}
    if path.is_file():
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept.values()))
    if lost := [s for s in range(1, step + 1) if is_logged(s, config, plan) and s not in kept]:
        print(
            f"notice: {path}: {len(lost)} rows between steps {lost[0]} and {lost[-1]} are damaged or missing; "
            "the run goes on without them",
            file=sys.stderr,
        )


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
        return row if all(isinstance(row[key], int | float) for key in METRIC) else None
    except (ValueError, TypeError, KeyError):
        return None
