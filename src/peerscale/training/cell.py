"""Training of one cell, from its plan to its record."""

import contextlib
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

from peerscale.config import Config, to_dict
from peerscale.data.batches import TrainBatches
from peerscale.data.store import Corpus, open_corpus
from peerscale.errors import UserError
from peerscale.files import remove_abandoned, write_text
from peerscale.kernels.backends import resolve
from peerscale.model.trained import CHECKPOINTS, checkpoints
from peerscale.plan import Plan
from peerscale.runs.record import Record, Status, fingerprint, read_record, science, write_record
from peerscale.runs.study import plan_summary
from peerscale.sweeper import FINISHED, Cell, check_same
from peerscale.training import distributed
from peerscale.training.checkpoint import TimedCheckpoint, newest_readable
from peerscale.training.environment import EXACT_KEYS, describe
from peerscale.training.evaluation import Evaluation, evaluate
from peerscale.training.loader import StepLoader
from peerscale.training.memory import keep_freed_memory
from peerscale.training.metrics import Diverged, MetricsLog
from peerscale.training.module import LanguageModel
from peerscale.training.tracking import Tracker, cut_back


def train_cell(cell: Cell) -> Status:
    """Train, evaluate and record a cell; resumes from its newest checkpoint, and returns at once if it is finished.

    A failed or diverged cell is recorded and does not raise; a user's error does.
    """
    corpus = open_corpus(cell.config.data)
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
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        print(f"\n{cell.name} failed: {reason}", file=sys.stderr)
        return run.close(replace(run.record, status=Status.FAILED, reason=reason, traceback=traceback.format_exc()))


class CellRun:
    """The state of one cell while it runs.

    It writes nothing until the model is built, which is after all that a user can get wrong has been checked.
    """

    def __init__(self, cell: Cell, corpus: Corpus, old: Record | None) -> None:
        self.cell, self.corpus, self.config, self.plan = cell, corpus, cell.config, cell.plan
        self.checkpoint_folder = cell.folder / CHECKPOINTS
        remove_abandoned(cell.folder)
        remove_abandoned(self.checkpoint_folder)
        prepare_process(self.config)
        self.device = pick_device(self.config)
        kernel = resolve(self.config.trainer.kernel, self.device.type)
        environment = describe(kernel, self.device, self.config.trainer)
        self.resumed = newest_readable(self.checkpoint_folder)
        exact = True
        if self.resumed and old is not None:
            before = {"n_devices": 1, "shard_tables": False, **old.environment}  # older records don't name them
            changed = [key for key in EXACT_KEYS if before.get(key) != environment[key]]
            exact = old.bit_exact and not changed
            if changed:
                print(f"notice: {cell.name} goes on with another {', '.join(changed)}: not bit-exact", file=sys.stderr)
        hashed = science(self.config, corpus.manifest.fingerprint)
        self.record = Record(
            sweep=cell.sweep,
            cell=cell.name,
            status=Status.RUNNING,
            fingerprint=fingerprint(hashed),
            science=hashed,
            method=self.config.ffn.method,
            variant=self.config.ffn.variant,
            plan=plan_summary(self.config, self.plan),
            params=self.plan.cost.params,
            flops_per_token=self.plan.cost.flops,
            environment=environment,
            bit_exact=exact,
        )
        self.tracker: Tracker | None = None

    def train(self) -> Status:
        """Fit, evaluate, record."""
        config, plan, trainer = self.config, self.plan, self.config.trainer
        resumed, first_step = self.resumed or (None, 0)
        with self._further_ranks():
            module = build_module(config, plan)
            self._write(self.record)
            cut_back(self.cell.folder, first_step)
            self.tracker = Tracker(self.cell.folder, to_dict(config), self.record)
            saving = TimedCheckpoint(
                self.checkpoint_folder,
                trainer.checkpoint_every_s,
                trainer.checkpoint_every_steps,
                last_step=plan.steps if trainer.keep_checkpoint else None,
            )
            fit(module, self.corpus, self.tracker, saving, resumed)
            wall_s, started = saving.trained_s, time.perf_counter()
            evaluation = evaluate(module, self.corpus, config, self.device)
        timing = {
            "wall_s": wall_s,
            "evaluation_s": time.perf_counter() - started,
            "tokens_per_s": plan.tokens / wall_s,
            "flops_per_s": plan.flops / wall_s,
        }
        return self.close(self._result(evaluation, timing))

    def _further_ranks(self) -> contextlib.AbstractContextManager[None]:
        if self.config.trainer.devices == 1:
            return contextlib.nullcontext()
        job = {
            "config": to_dict(self.config),
            "checkpoints": str(self.checkpoint_folder),
            "resumed": str(self.resumed[0]) if self.resumed else None,
        }
        return distributed.ranks(self.config.trainer.devices, self.device, job)

    def close(self, record: Record) -> Status:
        """Write the record and end the W&B run with what it says; a finished cell keeps one checkpoint, or none."""
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

    def _result(self, evaluation: Evaluation, timing: dict[str, float]) -> Record:
        diverged = not np.isfinite(evaluation.sequence_losses).all()
        return replace(
            self.record,
            status=Status.DIVERGED if diverged else Status.DONE,
            reason="the validation loss is not a finite number" if diverged else "",
            evaluation=evaluation.sets,
            sequence_losses=evaluation.sequence_losses,
            router=evaluation.router,
            timing=timing,
        )


def prepare_process(config: Config) -> None:
    """Threads and memory of a process that trains."""
    torch.set_num_threads(config.trainer.threads)
    keep_freed_memory()


def build_module(config: Config, plan: Plan) -> LanguageModel:
    """The untrained model of a cell on this rank; raises `UserError` if its layer draws no weights of its own."""
    lightning.seed_everything(config.seed, verbose=False)
    sharded = config.trainer.shard_tables and config.trainer.devices > 1
    module = distributed.ShardedLanguageModel(config, plan) if sharded else LanguageModel(config, plan)
    if config.trainer.compile:
        module.model.features = torch.compile(module.model.features)
    return module


def fit(
    module: LanguageModel, corpus: Corpus, tracker: Tracker | None, saving: TimedCheckpoint, resumed: Path | None
) -> None:
    """Train, on this rank; from the checkpoint `resumed`, if there is one. Metrics go to `tracker`."""
    config, plan = module.config, module.plan
    batches = TrainBatches(
        corpus.tokens("train"), seed=config.seed, batch_sequences=config.batch_sequences, context=config.context
    )
    trainer = build_trainer(config, plan, module, [MetricsLog(config, plan, tracker), saving])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        try:
            trainer.fit(module, StepLoader(batches, plan.steps), ckpt_path=resumed, weights_only=True)
        except SystemExit:  # Lightning turns Ctrl-C into this
            raise KeyboardInterrupt from None


def build_trainer(
    config: Config, plan: Plan, module: LanguageModel, callbacks: list[lightning.Callback]
) -> lightning.Trainer:
    """Lightning's Trainer, with everything switched off that this project does itself."""
    # By default a cluster's variables, or srun on the PATH, would change what is run.
    devices: dict[str, Any] = {"devices": 1, "plugins": [LightningEnvironment()]}
    if config.trainer.devices > 1:
        devices = distributed.settings(config.trainer.devices)
        callbacks = [*callbacks, distributed.TableExchange(module)]
    logging.getLogger("lightning").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    return lightning.Trainer(
        accelerator=config.trainer.accelerator,
        **devices,
        precision="bf16-mixed" if config.precision == "bf16" else "32-true",
        max_steps=plan.steps,
        max_epochs=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )


def pick_device(config: Config, rank: int = 0) -> torch.device:
    """Where a rank of the cell runs; raises `UserError` if the GPUs asked for are not there."""
    has_gpu = torch.cuda.is_available()
    if config.trainer.accelerator == "gpu" and not has_gpu:
        raise UserError("trainer.accelerator=gpu, but torch sees no GPU here; allowed: auto, cpu")
    if not has_gpu or config.trainer.accelerator == "cpu":
        return torch.device("cpu")
    if config.trainer.devices > torch.cuda.device_count():
        raise UserError(
            f"trainer.devices={config.trainer.devices}, but torch sees {torch.cuda.device_count()} GPUs here; "
            "fewer devices, or trainer.accelerator=cpu"
        )
    return torch.device("cuda", rank) if config.trainer.devices > 1 else torch.device("cuda")
