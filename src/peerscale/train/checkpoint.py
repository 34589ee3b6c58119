"""Checkpoints: written atomically; the last two are kept; a run resumes from the newest readable one."""

import itertools
import os
import signal
import sys
import threading
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT

from peerscale.errors import UserError
from peerscale.files import replacing
from peerscale.model.trained import CHECKPOINTS, checkpoint_path, checkpoints
from peerscale.records.record import is_held, read_record
from peerscale.train.loader import refuse_other_micro_batches
from peerscale.train.ranks import as_first_rank, is_first_rank, n_ranks

KEPT = 2

MADE_BY = "start_fingerprint"
"""Key of a checkpoint: the `start_fingerprint` of the run that made it. Older checkpoints do not have it."""

MICRO_BATCHES = "micro_batches"
"""Key of a checkpoint: the number of micro-batches of a step. Older checkpoints have it in the loader's state only."""

COST = 0.02
"""Share of the time that saving may take; the interval after a slow save is longer."""


class TimedCheckpoint(lightning.Callback):
    """Saves the whole training state every `every_s` seconds or `every_steps` steps, and counts the time trained.

    It also saves after step `last_step`, and after the step in which a SIGTERM (with several ranks also Ctrl-C)
    arrived; Lightning then ends the run. It does not save after an exception, since an exception inside a step leaves
    weights and counters between two steps. `branches` has steps and the folders of the cells that continue from them:
    each of these cells gets a checkpoint after its step, unless it has started already. `made_by` is written into every
    checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        every_s: float,
        every_steps: int | None = None,
        last_step: int | None = None,
        branches: Sequence[tuple[int, Path]] = (),
        made_by: str = "",
    ) -> None:
        self.folder, self.every_s, self.every_steps, self.last_step = folder, every_s, every_steps, last_step
        self.branches, self.made_by = branches, made_by
        self.save_s = 0.0
        self.earlier_s = 0.0
        self.started_at = time.monotonic()
        self.saved_at = time.monotonic()
        self.terminated = False

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # a micro-batch within a step
        step, terminated = trainer.global_step, self.terminated
        for folder in (folder for at, folder in self.branches if at == step):
            if as_first_rank(read_record(folder) is None and not is_held(folder)):
                write_checkpoint(trainer, checkpoint_path(folder / CHECKPOINTS, step))
        due = step == self.last_step or (self.every_steps and step % self.every_steps == 0)
        waited_s = time.monotonic() - self.saved_at
        due = terminated or due or waited_s >= max(self.every_s, self.save_s / COST)
        if as_first_rank(bool(due)):
            self.save(trainer)
            if as_first_rank(terminated):
                trainer._signal_connector.received_sigterm = True

    @property
    def trained_s(self) -> float:
        """Seconds of training so far, including those before an interruption."""
        return self.earlier_s + time.monotonic() - self.started_at

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.started_at = self.saved_at = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            # Replaces Lightning's handler, which may end the run on all ranks before the step is saved.
            signal.signal(signal.SIGTERM, self._terminate)
            if n_ranks() > 1:  # all ranks must end together, or some would wait for the others
                signal.signal(signal.SIGINT, self._terminate)

    def _terminate(self, *_: object) -> None:
        self.terminated = True

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint |= {MADE_BY: self.made_by, MICRO_BATCHES: trainer.accumulate_grad_batches}

    def state_dict(self) -> dict[str, Any]:
        return {"trained_s": self.trained_s}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.earlier_s = state_dict["trained_s"]

    def save(self, trainer: lightning.Trainer) -> None:
        started = time.monotonic()
        write_checkpoint(trainer, checkpoint_path(self.folder, trainer.global_step))
        if not is_first_rank():
            return
        for old in checkpoints(self.folder)[KEPT:]:
            old.unlink()
        self.saved_at = time.monotonic()
        self.save_s = self.saved_at - started


def write_checkpoint(trainer: lightning.Trainer, path: Path) -> None:
    """Save the whole training state; all ranks take part, and the first one writes."""
    if not is_first_rank():
        return trainer.save_checkpoint(path)
    with replacing(path) as temporary:
        trainer.save_checkpoint(temporary)
        with temporary.open("rb") as file:  # must be on disk before an older checkpoint is removed
            os.fsync(file.fileno())


def newest_readable(folder: Path, made_by: str, micro_batches: int) -> tuple[Path, int] | None:
    """The newest complete checkpoint and its step; damaged ones are renamed, with a notice.

    So are those of another run than `made_by`, such as one that a trunk left for a branch, without a record, before the
    configuration changed. No code in a file is run: only weights and plain values are loaded, and any other pickle is
    refused.

    Raises:
        UserError: the run was begun with another number of micro-batches.
    """
    found = checkpoints(folder)
    for path, before in itertools.zip_longest(found, found[1:]):
        problem = "is of another configuration"
        try:
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():  # torch itself does not compare checksums
                    raise zipfile.BadZipFile(f"bad checksum of {damaged}")
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            if state.get(MADE_BY, made_by) == made_by:
                refuse_other_micro_batches(state.get(MICRO_BATCHES, micro_batches), micro_batches)
                return path, state["global_step"]
        except UserError:
            raise
        except Exception as error:  # a damaged archive can raise many types of errors
            problem = f"cannot be read ({type(error).__name__})"
        instead = f"continuing from {before.name}" if before else "starting at the first step"
        path.rename(path.with_suffix(".unusable"))
        print(f"notice: {path} {problem}, {instead}", file=sys.stderr, flush=True)
    return None
