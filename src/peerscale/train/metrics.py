"""Training metrics: a row every few steps, in `metrics.jsonl` and Lightning's loggers; runs that diverge end."""

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
from peerscale.data.batches import EvaluationBatches
from peerscale.data.store import Corpus, open_corpus
from peerscale.files import write_text
from peerscale.plan.held_out_sets import evaluated_tokens
from peerscale.plan.plan import Plan
from peerscale.records.curves import METRICS, parse_row, row_line
from peerscale.train.evaluation import attach_usage, detach_usage, sequence_losses
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
        self.rates: dict[str, float] = {}
        """Learning rates of the present step."""
        self.val_batches: EvaluationBatches | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.since, self.since_step = time.perf_counter(), trainer.global_step
        if trainer.is_global_zero:
            self.file = self.path.open("a", encoding="utf-8")
        if self.config.trainer.validations and trainer.world_size == 1:  # one rank alone would wait for the others
            self.val_batches = small_part(open_corpus(self.config.data), self.config, self.plan.steps)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches:
            return  # a micro-batch within a step
        groups = trainer.optimizers[0].param_groups  # which after the step have the next step's rates
        of_tables = [group["lr"] for group in groups if group.get("tables")]
        self.rates = {"lr": groups[0]["lr"]} | ({"table_lr": of_tables[0]} if of_tables else {})
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
        seconds = time.perf_counter() - self.since
        tokens = step * self.config.tokens_per_step
        row = {
            "step": step,
            "tokens": tokens,
            "flops": tokens * self.plan.cost.flops_per_token,
            "loss": loss,
            **self.rates,
            "grad_norm": float(pl_module.grad_norm),
            "tokens_per_s": (step - self.since_step) * self.config.tokens_per_step / seconds,
            **detach_usage(pl_module, trainer),
        }
        if self.val_batches is not None and is_validated(step, self.config, self.plan):
            pl_module.eval()
            row["val_loss"] = float(sequence_losses(pl_module, self.val_batches).mean())
            pl_module.train()
        if not math.isfinite(loss):
            trainer.callback_metrics.update({DIVERGED_AT: torch.tensor(step), "loss": torch.tensor(loss)})
            trainer.should_stop = True
        elif self.file is not None:
            self.file.write(row_line(row))
            self.file.flush()
            for logger in trainer.loggers:
                logger.log_metrics(row, step)
        self.loss_sum, self.loss_count = torch.zeros(()), 0
        self.since, self.since_step = time.perf_counter(), step

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


def is_validated(step: int, config: Config, plan: Plan) -> bool:
    """Whether the row after `step` has the loss on a part of the validation set; the last row has."""
    every, n = config.trainer.log_every_steps, config.trainer.validations
    before = (step - 1) // every * every  # the step of the row before, also where the run was resumed since
    return step * n // plan.steps > before * n // plan.steps


def small_part(corpus: Corpus, config: Config, steps: int) -> EvaluationBatches:
    """The batches of `data.val_set` for losses during training: one for every 300 steps of the run.

    A batch costs a third of a training step, so that ten evaluations take at most 2 % of a run of 200 steps or more.
    """
    name = config.data.val_set
    there = evaluated_tokens(config, corpus.manifest.splits)[name]
    n_tokens = min(max(1, steps // 300) * config.tokens_per_step, there)
    shape = {"batch_sequences": config.batch_sequences, "context": config.context}
    return EvaluationBatches(corpus.tokens(name), n_tokens, **shape)


def cut_back(folder: Path, step: int, config: Config, plan: Plan) -> None:
    """Remove the rows after `step`, which a resumed run writes again, and damaged ones; a notice tells what is lost."""
    path = folder / METRICS
    rows = filter(None, map(parse_row, path.read_bytes().splitlines() if path.is_file() else []))
    kept = {row["step"]: row for row in rows if row["step"] <= step}
    if path.is_file():
        write_text(path, "".join(map(row_line, kept.values())))
    if lost := [s for s in range(1, step + 1) if is_logged(s, config, plan) and s not in kept]:
        print(
            f"notice: {path}: {len(lost)} rows between steps {lost[0]} and {lost[-1]} are damaged or missing; "
            "the run goes on without them",
            file=sys.stderr,
        )
