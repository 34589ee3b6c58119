"""Checkpoints: atomic, the last two kept, the newest readable one found again."""

import time
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT

from peerscale.files import replacing

KEPT = 2


class TimedCheckpoint(lightning.Callback):
    """Saves the whole training state every `every_s` seconds.

    Not when a run breaks off: an exception inside a step leaves weights and counters between two steps.
    """

    def __init__(self, folder: Path, every_s: float) -> None:
        self.folder, self.every_s = folder, every_s
        self.saved_at = time.monotonic()
        self.saved_step = -1

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if time.monotonic() - self.saved_at >= self.every_s:
            self.save(trainer)

    def save(self, trainer: lightning.Trainer) -> None:
        step = trainer.global_step
        if step == self.saved_step:
            return
        with replacing(self.folder / f"step-{step:09d}.ckpt") as temporary:
            trainer.save_checkpoint(temporary)
        for old in checkpoints(self.folder)[KEPT:]:
            old.unlink()
        self.saved_step, self.saved_at = step, time.monotonic()


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a cell, newest first."""
    return sorted(folder.glob("step-*.ckpt"), reverse=True)


def newest_readable(folder: Path) -> tuple[Path, int] | None:
    """The newest checkpoint that can be read, and its step; truncated ones are passed over with a notice."""
    for path in checkpoints(folder):
        try:
            step = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"]
        except Exception as error:  # a truncated archive raises one of many types
            print(f"notice: {path} cannot be read ({type(error).__name__}), trying the one before", flush=True)
            continue
        return path, step
    return None
