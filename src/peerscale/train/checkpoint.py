"""Checkpoints: Lightning's, written durably beside their target; a run resumes from the newest readable one."""

import itertools
import os
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.types import STEP_OUTPUT

from peerscale.config.schema import TrainerConfig
from peerscale.errors import UserError
from peerscale.files import replacing
from peerscale.model.trained import MADE_BY, checkpoints, read_checkpoint

KEPT = 2

MICRO_BATCHES, TRAINED_S, RANDOM = "micro_batches", "trained_s", "random"
"""Further keys of a checkpoint: the micro-batches of a step, the seconds trained so far, and torch's random states by
type of device, if there is one device."""


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its target, syncs it to disk and renames it.

    Lightning's own writes to the folder for temporary files and moves the file, which is not atomic between file
    systems and fails if that folder is full (`tests/train/test_checkpoint.py`, nothing_is_staged_elsewhere).
    """

    def save_checkpoint(
        self, checkpoint: Mapping[str, Any], path: str | os.PathLike, storage_options: Any = None
    ) -> None:
        with replacing(Path(path)) as temporary, temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())


class StepCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, which saves by time or by steps and keeps the last `KEPT` checkpoints.

    Alone it would also save between two micro-batches of a step, without the gradients so far, and would save nothing
    at a SIGTERM, after which Lightning ends the run (`tests/train/test_checkpoint.py`: a_step_in_parts, a_termination).
    It does not save after other exceptions, which may leave weights and counters between two steps.
    """

    def __init__(
        self, folder: Path, trainer: TrainerConfig, *, fingerprint: str, trained_s: float = 0.0, last_step: int = -1
    ) -> None:
        """`trained_s` are the seconds trained before a resumption; after `last_step` a checkpoint is always saved."""
        steps = trainer.checkpoint_every_steps
        super().__init__(
            dirpath=folder,
            filename="step-{step:09d}",
            auto_insert_metric_name=False,
            monitor="step",
            mode="max",
            save_top_k=KEPT,
            enable_version_counter=False,
            every_n_train_steps=steps,
            train_time_interval=None if steps else timedelta(seconds=trainer.checkpoint_every_s),
        )
        self.fingerprint, self.trained_s, self.last_step = fingerprint, trained_s, last_step
        self.since = time.monotonic()
        self.random: dict[str, torch.Tensor] = {}
        """To be set before the next step."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.since = time.monotonic()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        for device, state in self.random.items():
            (torch.cuda if device == "cuda" else torch).set_rng_state(state)
        self.random = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # a micro-batch within a step
        ending = trainer.received_sigterm and trainer.world_size == 1  # ranks would have to agree
        if (ending or trainer.global_step == self.last_step) and not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        trained_s = self.trained_s + time.monotonic() - self.since
        checkpoint |= {
            MADE_BY: self.fingerprint, MICRO_BATCHES: trainer.accumulate_grad_batches, TRAINED_S: trained_s,
        }  # fmt: skip
        if trainer.world_size == 1:  # ranks draw each their own
            on_gpu = trainer.strategy.root_device.type == "cuda"
            checkpoint[RANDOM] = {
                "cpu": torch.get_rng_state(), **({"cuda": torch.cuda.get_rng_state()} if on_gpu else {}),
            }  # fmt: skip

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.random = checkpoint.get(RANDOM, {})  # which those of older versions do not have


class Resumed(NamedTuple):
    """Where a run goes on; without a checkpoint at its start."""

    path: Path | None = None
    step: int = 0
    trained_s: float = 0.0


def newest_readable(folder: Path, made_by: str, micro_batches: int) -> Resumed:
    """The newest complete checkpoint of the run with fingerprint `made_by`; others are renamed, with a notice.

    Raises:
        UserError: the run was begun with another number of micro-batches.
    """
    found = checkpoints(folder)
    for path, before in itertools.zip_longest(found, found[1:]):
        try:
            state = read_checkpoint(path, made_by)
        except UserError as error:
            instead = f"continuing from {before.name}" if before else "starting at the first step"
            path.rename(path.with_suffix(".unusable"))
            print(f"notice: {error}, {instead}", file=sys.stderr, flush=True)
            continue
        if (begun := state[MICRO_BATCHES]) != micro_batches:
            raise UserError(
                f"the cell was started with trainer.micro_batches={begun} and continues only with that, "
                f"not with {micro_batches}"
            )
        return Resumed(path, state["global_step"], state[TRAINED_S])
    return Resumed()
