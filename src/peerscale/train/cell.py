"""Training of one cell, from its plan to its record."""

import logging
import sys
import time
import traceback
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
import yaml
from lightning.fabric.plugins.environments import LightningEnvironment

from peerscale.config.schema import Config, to_dict
from peerscale.data.batches import TrainBatches
from peerscale.data.store import Corpus, open_corpus
from peerscale.errors import UserError
from peerscale.files import remove_abandoned, write_text
from peerscale.model.trained import CHECKPOINTS, checkpoint_path, checkpoints
from peerscale.ops.backends import choose_operators
from peerscale.plan.cells import FINISHED, Cell, check_same
from peerscale.plan.plan import Plan
from peerscale.records.fingerprint import start_fingerprint
from peerscale.records.record import Record, Status, new_record, read_record, write_record
from peerscale.train.checkpoint import TimedCheckpoint, newest_readable
from peerscale.train.distributed import (
    RankError,
    joined_ranks,
    launch,
    local_rank,
    started_ranks,
    trainer_settings,
)
from peerscale.train.environment import changed_keys, describe
from peerscale.train.evaluation import evaluate
from peerscale.train.loader import StepLoader
from peerscale.train.memory import keep_freed_memory
from peerscale.train.metrics import Diverged, MetricsLog
from peerscale.train.module import LanguageModel
from peerscale.train.ranks import as_first_rank
from peerscale.train.table_exchange import TableExchange
from peerscale.train.tracking import Tracker, cut_back


def train_cell(cell: Cell) -> Status:
    """Train, evaluate and record a cell. Resumes from its newest checkpoint; returns at once if it is finished.

    A failed or diverged cell is recorded and raises nothing.

    Raises:
        UserError: the cell cannot be run as it is.
    """
    corpus = open_corpus(cell.config.data)
    old = read_record(cell.folder)
    if old is not None:
        check_same(cell, old, corpus.manifest.fingerprint)
        if old.status in FINISHED:
            return old.status
    devices, (rank, n_started) = cell.config.trainer.devices, started_ranks()
    if n_started not in (1, devices):
        raise UserError(f"torchrun or srun started {n_started} processes, but trainer.devices is {devices}")
    if n_started < devices:
        return _launch_ranks(cell, corpus, old)
    if rank > 0:
        return _train_with_first_rank(cell, corpus)
    run = CellRun(cell, corpus, old)
    try:
        return run.train()
    except UserError:
        raise
    except Diverged as error:
        return run.close(replace(run.record, status=Status.DIVERGED, reason=str(error)))
    except Exception as error:
        failed = _failed(run.record, error)
        print(f"\n{cell.name} failed: {failed.reason}", file=sys.stderr)
        return run.close(failed)


def _failed(record: Record, error: Exception) -> Record:
    reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return replace(record, status=Status.FAILED, reason=reason, traceback="".join(traceback.format_exception(error)))


def _launch_ranks(cell: Cell, corpus: Corpus, old: Record | None) -> Status:
    """Start processes for the ranks of the cell; the first rank records it."""
    try:
        launch(cell.config.trainer.devices, cell)
    except RankError as error:
        ended = read_record(cell.folder) or CellRun(cell, corpus, old).record
        failed = _failed(ended, error)
        if ended.status in FINISHED:  # its result is complete, and its checkpoint may be gone
            print(f"notice: {cell.name} is {ended.status}, but afterwards {failed.reason}", file=sys.stderr)
            return ended.status
        print(f"\n{cell.name} failed: {failed.reason}", file=sys.stderr)
        write_record(cell.folder, failed)
    record = read_record(cell.folder)
    assert record is not None
    return record.status


def _train_with_first_rank(cell: Cell, corpus: Corpus) -> Status:
    """Train and evaluate as a rank other than the first, which writes files and decides."""
    config, folder = cell.config, cell.folder / CHECKPOINTS
    prepare_process(config)
    device = pick_device(config)
    with joined_ranks(device):
        module = build_module(config, cell.plan, device)
        resumed_step = as_first_rank(0)
        resumed = checkpoint_path(folder, resumed_step) if resumed_step else None
        try:
            saving = TimedCheckpoint(folder, config.trainer.checkpoint_every_s, branches=branches(cell))
            fit(module, corpus, None, saving, resumed)
        except Diverged:
            return Status.DIVERGED
        evaluate(module, corpus, config, device)
    return Status.DONE


def branches(cell: Cell) -> list[tuple[int, Path]]:
    """The folders of a cell's branches, each with the step from which it continues."""
    return [(step, cell.folder.parent / name) for step, name in cell.branches]


class CellRun:
    """The state of one cell while it runs.

    It writes no files until the model is built; by then all possible user errors have been checked.
    """

    def __init__(self, cell: Cell, corpus: Corpus, old: Record | None) -> None:
        self.cell, self.corpus, self.config, self.plan = cell, corpus, cell.config, cell.plan
        self.checkpoint_folder = cell.folder / CHECKPOINTS
        # Until the present environment is known, the record has that of the steps trained before, perhaps by its trunk.
        old = old or (read_record(cell.folder.parent / cell.trunk) if cell.trunk else None)
        before = {"environment": old.environment, "bit_exact": old.bit_exact} if old is not None else {}
        self.record = new_record(cell, Status.RUNNING, corpus.manifest.fingerprint, **before)
        self.made_by = start_fingerprint(self.record.hashed_config)
        self.tracker: Tracker | None = None

    def train(self) -> Status:
        """Train, evaluate and record the cell."""
        config, plan, trainer = self.config, self.plan, self.config.trainer
        remove_abandoned(self.cell.folder)
        remove_abandoned(self.checkpoint_folder)
        prepare_process(config)
        device = pick_device(config)
        resumed, first_step = newest_readable(
            self.checkpoint_folder, self.made_by, config.surroundings.micro_batches
        ) or (None, 0)
        kernel = choose_operators(trainer.kernel, device.type).name
        self._continue_in(describe(kernel, device, trainer), first_step)
        with joined_ranks(device):
            module = build_module(config, plan, device)
            as_first_rank(first_step)
            self._write(self.record)
            cut_back(self.cell.folder, first_step)
            self.tracker = Tracker(self.cell.folder, to_dict(config), self.record)
            saving = TimedCheckpoint(
                self.checkpoint_folder,
                trainer.checkpoint_every_s,
                trainer.checkpoint_every_steps,
                last_step=plan.steps if trainer.keep_checkpoint else None,
                branches=branches(self.cell),
                made_by=self.made_by,
            )
            fit(module, self.corpus, self.tracker, saving, resumed)
            wall_s, started = saving.trained_s, time.perf_counter()
            results = evaluate(module, self.corpus, config, device)
        timing = {
            "wall_s": wall_s,
            "evaluation_s": time.perf_counter() - started,
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
        if self.tracker is not None:
            record = replace(record, signals=self.tracker.signals)
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


def prepare_process(config: Config) -> None:
    """Set the threads and the memory allocation of a process that trains."""
    torch.set_num_threads(config.trainer.threads)
    keep_freed_memory()


def build_module(config: Config, plan: Plan, device: torch.device) -> LanguageModel:
    """The untrained model of a cell on this rank; raises `UserError` if its layer does not draw its weights."""
    lightning.seed_everything(config.seed, verbose=False)
    return LanguageModel(config, plan, device.type)


def fit(
    module: LanguageModel, corpus: Corpus, tracker: Tracker | None, saving: TimedCheckpoint, resumed: Path | None
) -> None:
    """Train on this rank, from the checkpoint `resumed` if there is one. Metrics go to `tracker`."""
    config, plan = module.config, module.plan
    batches = TrainBatches(
        corpus.tokens("train"), seed=config.seed, batch_sequences=config.batch_sequences, context=config.context
    )
    trainer = build_trainer(config, plan, module, [MetricsLog(config, plan, tracker), saving])
    on_gpu = trainer.strategy.root_device.type == "cuda"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        try:
            trainer.fit(
                module,
                StepLoader(batches, plan.steps, config.surroundings.micro_batches, pin_memory=on_gpu),
                ckpt_path=resumed,
                weights_only=True,
            )
        except SystemExit:  # Lightning turns Ctrl-C into this
            raise KeyboardInterrupt from None


def build_trainer(
    config: Config, plan: Plan, module: LanguageModel, callbacks: list[lightning.Callback]
) -> lightning.Trainer:
    """Lightning's Trainer, without the features that this project implements itself."""
    # By default, a cluster's environment variables or srun on the PATH would change how Lightning runs.
    devices: dict[str, Any] = {"devices": 1, "plugins": [LightningEnvironment()]}
    if config.trainer.devices > 1:
        devices = trainer_settings()
        callbacks = [*callbacks, TableExchange(module)]
    logging.getLogger("lightning").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    return lightning.Trainer(
        accelerator="gpu" if pick_device(config).type == "cuda" else "cpu",
        **devices,
        precision="bf16-mixed" if config.precision == "bf16" else "32-true",
        max_steps=plan.steps,
        max_epochs=1,
        accumulate_grad_batches=config.surroundings.micro_batches,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )


def pick_device(config: Config) -> torch.device:
    """The device of this rank; raises `UserError` if the requested GPU is not there."""
    has_gpu = torch.cuda.is_available()
    if config.trainer.accelerator == "gpu" and not has_gpu:
        raise UserError("trainer.accelerator=gpu, but torch sees no GPU here; allowed: auto, cpu")
    if not has_gpu or config.trainer.accelerator == "cpu":
        return torch.device("cpu")
    if local_rank() >= torch.cuda.device_count():
        raise UserError(
            f"trainer.devices={config.trainer.devices}, but torch sees {torch.cuda.device_count()} GPUs here; "
            "fewer devices, or trainer.accelerator=cpu"
        )
    return torch.device("cuda", local_rank()) if config.trainer.devices > 1 else torch.device("cuda")
