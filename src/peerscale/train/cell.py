"""Training of one cell, from its plan to its record."""

import signal
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
import yaml
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from torch import nn

from peerscale.config.schema import Config, to_dict
from peerscale.data.store import Corpus, open_corpus
from peerscale.errors import UserError
from peerscale.files import remove_abandoned, write_text
from peerscale.model.trained import CHECKPOINTS, checkpoints
from peerscale.ops.backends import choose_operators
from peerscale.plan.cell import Cell
from peerscale.records.outcome import FINISHED, check_same
from peerscale.records.record import Record, Status, new_record, read_record, write_record
from peerscale.train.checkpoint import DurableCheckpointIO, StepCheckpoint, newest_readable
from peerscale.train.environment import changed_keys, describe
from peerscale.train.evaluation import evaluate
from peerscale.train.metrics import DIVERGED_AT, Diverged, MetricsLog, cut_back
from peerscale.train.module import LanguageModel, prepare_process
from peerscale.train.tracking import RunLogger, start_tracking


def train_cell(cell: Cell) -> Status:
    """Train, evaluate and record a cell. Resumes from its newest checkpoint; returns at once if it is finished.

    A failed or diverged cell is recorded and raises nothing.

    Raises:
        UserError: the cell cannot be run as it is.
    """
    corpus = open_corpus(cell.config.data)
    corpus.tokens("train")  # opens the evaluation sets too, since another corpus may take their place in training
    old = read_record(cell.folder)
    if old is not None:
        check_same(cell, old, corpus.manifest.fingerprint)
        if old.status in FINISHED:
            return old.status
    run = CellRun(cell, corpus, old)
    try:
        return run.train()
    except UserError:
        raise
    except Diverged as error:
        return run.close(replace(run.record, status=Status.DIVERGED, reason=str(error)))
    except Exception as error:
        # Of an exception in one of several processes, the text is that process's traceback.
        lines = str(error).strip().splitlines()
        said = lines[-1 if isinstance(error, torch.multiprocessing.ProcessRaisedException) else 0] if lines else ""
        reason = f"{type(error).__name__}: {said}"
        print(f"\n{cell.name} failed: {reason}", file=sys.stderr)
        text = "".join(traceback.format_exception(error))
        return run.close(replace(run.record, status=Status.FAILED, reason=reason, traceback=text))


class CellRun:
    """The state of one cell while it runs.

    It writes no files until the model is built; by then all possible user errors have been checked.
    """

    def __init__(self, cell: Cell, corpus: Corpus, old: Record | None) -> None:
        self.cell, self.corpus, self.config, self.plan = cell, corpus, cell.config, cell.plan
        self.checkpoint_folder = cell.folder / CHECKPOINTS
        # Until the present environment is known, the record has that of the steps trained before.
        before = {"environment": old.environment, "bit_exact": old.bit_exact} if old is not None else {}
        self.record = new_record(cell, Status.RUNNING, corpus.manifest.fingerprint, **before)
        self.tracker: RunLogger | None = None

    def train(self) -> Status:
        """Train, evaluate and record the cell."""
        config, plan, trainer, folder = self.config, self.plan, self.config.trainer, self.cell.folder
        remove_abandoned(folder)
        remove_abandoned(self.checkpoint_folder)
        prepare_process(config)
        device = pick_device(config)
        resumed = newest_readable(self.checkpoint_folder, self.record.fingerprint, config.surroundings.micro_batches)
        self._continue_in(describe(choose_operators(trainer.kernel, device.type).name, device, trainer), resumed.step)
        module = LanguageModel(config, plan, device.type)
        if trainer.devices > 1:
            refuse_one_device_only(module, device)
        self._write(self.record)
        cut_back(folder, resumed.step, config, plan)
        self.tracker = start_tracking(folder, config, self.record)
        saving = StepCheckpoint(
            self.checkpoint_folder,
            trainer,
            fingerprint=self.record.fingerprint,
            trained_s=resumed.trained_s,
            last_step=plan.steps if trainer.keep_checkpoint else -1,
        )
        started = time.monotonic()
        fit(module, [MetricsLog(config, plan, folder), saving], self.tracker, resumed.path)
        wall_s, started = resumed.trained_s + time.monotonic() - started, time.monotonic()
        results = evaluate(module, self.corpus, config, device)
        timing = {
            "wall_s": wall_s,
            "evaluation_s": time.monotonic() - started,
            "tokens_per_s": plan.tokens / wall_s,
            "flops_per_s": plan.flops / wall_s,
        }
        ended: dict[str, Any] = {"status": Status.DONE}
        if not np.isfinite(results["sequence_losses"]).all():
            ended = {"status": Status.DIVERGED, "reason": "the validation loss is not a finite number"}
        return self.close(replace(self.record, timing=timing, **results, **ended))

    def _continue_in(self, environment: dict[str, Any], first_step: int) -> None:
        """Put the present environment into the record, with a notice if the cell was begun in another."""
        before = self.record.environment if first_step else {}
        changed = changed_keys(before, environment) if before else []
        if changed:
            what = f"{self.cell.name} continues with another {', '.join(changed)}"
            print(f"notice: {what}: not bit-exact", file=sys.stderr)
        exact = not first_step or (self.record.bit_exact and not changed)
        self.record = replace(self.record, environment=environment, bit_exact=exact)

    def close(self, record: Record) -> Status:
        """Write the record and end the W&B run with it; a finished cell keeps one checkpoint or none."""
        self._write(record)
        if record.status in FINISHED:
            kept = checkpoints(self.checkpoint_folder)[:1] if self.config.trainer.keep_checkpoint else []
            for path in {*self.checkpoint_folder.glob("step-*")} - {*kept}:
                path.unlink()
        if self.tracker is not None:
            self.tracker.finish(record)
        return record.status

    def _write(self, record: Record) -> None:
        write_text(self.cell.folder / "config.yaml", yaml.safe_dump(to_dict(self.config), sort_keys=False))
        write_record(self.cell.folder, record)


def fit(
    module: LanguageModel, callbacks: list[lightning.Callback], tracker: RunLogger | None, resumed: Path | None
) -> None:
    """Train with Lightning, from the checkpoint `resumed` if there is one.

    Several devices are processes that Lightning starts; they bring back the weights.

    Raises:
        Diverged: the training loss is no longer finite.
        KeyboardInterrupt: Ctrl-C or SIGTERM.
    """
    config = module.config
    on_gpu, several = pick_device(config).type == "cuda", config.trainer.devices > 1
    trainer = lightning.Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=config.trainer.devices,
        strategy=DDPStrategy(start_method="spawn") if several else "auto",
        sync_batchnorm=on_gpu and several,
        # By default, a cluster's environment variables or srun on the PATH would change how Lightning runs.
        plugins=[LightningEnvironment(), DurableCheckpointIO()],
        precision="bf16-mixed" if config.precision == "bf16" else "32-true",
        max_steps=module.plan.steps,
        max_epochs=1,
        accumulate_grad_batches=config.surroundings.micro_batches,
        callbacks=callbacks,
        logger=tracker or False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
    try:
        trainer.fit(module, ckpt_path=resumed, weights_only=True)
    except SystemExit:  # Lightning turns Ctrl-C and SIGTERM into this
        if isinstance(launcher := trainer.strategy.launcher, _MultiProcessingLauncher):
            launcher.kill(signal.SIGKILL)  # checkpoints are atomic, and there is nothing else to save
        raise KeyboardInterrupt from None
    if DIVERGED_AT in trainer.callback_metrics:
        loss, step = float(trainer.callback_metrics["loss"]), int(trainer.callback_metrics[DIVERGED_AT])
        raise Diverged(f"the training loss is {loss} at step {step}")


def refuse_one_device_only(module: LanguageModel, device: torch.device) -> None:
    """Raise `UserError` if several devices would not end with what one device ends with."""
    if module.config.optim.name == "row_sparse_adamw":
        raise UserError("optim=row_sparse_adamw trains on one device; with trainer.devices use optim=adamw")
    # Lightning synchronises BatchNorm on GPUs; torch cannot on CPUs.
    if device.type == "cpu" and any(isinstance(part, nn.BatchNorm1d) for part in module.modules()):
        raise UserError(
            "BatchNorm takes statistics over the batch, which CPU processes of trainer.devices would each take over "
            "their own part; ffn.query_norm=false, or groups within a device (routing_group_sequences)"
        )


def pick_device(config: Config) -> torch.device:
    """The device of a cell, the first of several; raises `UserError` if the requested GPUs are not there."""
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.trainer.accelerator == "gpu" and not n_gpus:
        raise UserError("trainer.accelerator=gpu, but torch sees no GPU here; allowed: auto, cpu")
    if not n_gpus or config.trainer.accelerator == "cpu":
        return torch.device("cpu")
    if config.trainer.devices > n_gpus:
        raise UserError(
            f"trainer.devices={config.trainer.devices}, but torch sees {n_gpus} GPUs here; fewer devices, or "
            "trainer.accelerator=cpu"
        )
    return torch.device("cuda")
