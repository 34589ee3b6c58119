"""Training metrics: a row every few steps; and a stop of runs that diverge."""

import time
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT

from peerscale.config.schema import Config
from peerscale.plan.plan import Plan
from peerscale.train.evaluation import attach_usage, detach_usage
from peerscale.train.module import LanguageModel
from peerscale.train.tracking import Tracker


class Diverged(Exception):
    """The training loss is no longer a finite number."""


class MetricsLog(lightning.Callback):
    """Logs a row every `log_every_steps` steps, if there is a tracker; stops a run whose loss is not finite."""

    def __init__(self, config: Config, plan: Plan, tracker: Tracker | None) -> None:
        self.config, self.plan, self.tracker = config, plan, tracker
        self.loss_sum, self.loss_count = torch.zeros(()), 0
        self.since, self.since_step = time.perf_counter(), 0
        self.lr = 0.0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.since, self.since_step = time.perf_counter(), trainer.global_step

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches:
            return  # a micro-batch within a step
        self.lr = trainer.optimizers[0].param_groups[0]["lr"]  # after the step it is the next step's rate
        # Router health is sampled: only the tokens of a logged step are counted.
        assert isinstance(pl_module, LanguageModel)
        if self._logs(trainer.global_step + 1):
            attach_usage(pl_module)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, LanguageModel) and isinstance(outputs, dict)
        self.loss_sum = self.loss_sum.to(pl_module.device) + outputs["cross_entropy"]
        self.loss_count += 1
        step = trainer.global_step
        if (batch_idx + 1) % trainer.accumulate_grad_batches or not self._logs(step):
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
            **detach_usage(pl_module),
        }
        if not np.isfinite(loss):
            raise Diverged(f"the training loss is {loss} at step {step}")
        if self.tracker is not None:
            self.tracker.log(row)
        self.loss_sum, self.loss_count = torch.zeros(()), 0
        self.since, self.since_step = now, step

    def _logs(self, step: int) -> bool:
        return step % self.config.trainer.log_every_steps == 0 or step == self.plan.steps

    def state_dict(self) -> dict[str, Any]:
        return {"loss_sum": self.loss_sum, "loss_count": self.loss_count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loss_sum, self.loss_count = state_dict["loss_sum"], state_dict["loss_count"]
