"""Weights & Biases: Lightning's logger, so guarded that no failure of W&B costs a run anything.

The files of a cell are authoritative; its W&B run is a copy. A resumed cell starts its copy with all rows that its
`metrics.jsonl` has; a server ignores those that it knows, since their steps are not new.
"""

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from lightning.pytorch.loggers import WandbLogger

from peerscale.config.schema import Config, to_dict
from peerscale.records.curves import read_metrics
from peerscale.records.fingerprint import fingerprint
from peerscale.records.record import FAILED, Record, Status

TIMEOUT_S = 10.0
"""The longest time that a cell waits for a W&B server, at its start and at its end."""

AXES = ("tokens", "flops")

_server_failed = False
"""A process in which a server did not answer logs offline from then on, so that it waits for it only once."""


class RunLogger(WandbLogger):
    """Logs the rows of `metrics.jsonl`; a row's step, tokens and FLOPs can each be the x axis.

    After the first failure it only says so, and does nothing more.
    """

    def __init__(self, folder: Path, config: Config, record: Record, mode: str) -> None:
        """Start the run of a cell; `mode` is online or offline. Any exception means that there is none."""
        import wandb

        tracking = config.tracking
        super().__init__(
            project=tracking.project,
            entity=tracking.entity,
            name=record.cell,
            id=run_id(record, tracking.id_salt),
            group=record.sweep,
            job_type="train",
            tags=[record.sweep, record.method, record.size, *tracking.tags],
            config={**to_dict(config), "derived": {**record.plan, "name": config.ffn.name}},
            save_dir=folder,
            mode=mode,
            # With `resume`, a later `wandb sync` of an offline run would renumber the steps.
            resume="allow" if mode == "online" else None,
            reinit="create_new",
            settings=wandb.Settings(
                console="off",
                silent=True,
                x_disable_stats=True,
                x_disable_meta=True,
                init_timeout=TIMEOUT_S,
                finish_timeout=TIMEOUT_S,
                finish_timeout_raises=True,
            ),
        )
        self._wandb_init.pop("anonymous")  # the client says at each start that this setting has no effect
        self.sweep, self.has_failed = record.sweep, False
        for axis in AXES:
            self.experiment.define_metric(axis)
        self.experiment.define_metric("train/*", step_metric="tokens")

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log a row of `metrics.jsonl`."""
        row = {key if key in AXES else f"train/{key}": value for key, value in metrics.items() if key != "step"}
        self._try(lambda: self.experiment.log({**row, "trainer/global_step": step}, step=step))

    def finish(self, record: Record) -> None:
        """End the run with the results of `record` as its summary."""
        losses = {f"{name}/{key}": value for name, values in record.evaluation.items() for key, value in values.items()}
        summary = {"status": str(record.status), "reason": record.reason, **losses, **record.router, **record.timing}
        summary |= {status: int(record.status is status) for status in FAILED}  # as numbers, so that W&B can sum them
        self._try(lambda: self.experiment.summary.update(summary))
        self._try(lambda: self.experiment.finish(exit_code=0 if record.status is Status.DONE else 1))

    def _try(self, action: Callable[[], object]) -> None:
        if not self.has_failed:
            try:
                action()
            except Exception as error:  # the client raises many types, also for a dead service or a time limit
                self.has_failed = True
                give_up(error, self.sweep)


def start_tracking(folder: Path, config: Config, record: Record) -> RunLogger | None:
    """The W&B run of a cell, with the rows that it has; offline if no server answers; None if there is to be none."""
    os.environ.setdefault("WANDB_SILENT", "true")
    modes = {"disabled": [], "offline": ["offline"], "online": ["online", "offline"]}[config.tracking.mode]
    for mode in modes[1:] if _server_failed else modes:
        # Earlier parts hold only rows that the new run also gets: copied here, or trained again.
        shutil.rmtree(folder / "wandb", ignore_errors=True)
        try:
            if mode == "online":
                import wandb

                if not wandb.login(prompt=False, verify=False):
                    raise RuntimeError("no API key: .venv/bin/wandb login, or WANDB_API_KEY")
            logger = RunLogger(folder, config, record, mode)
        except Exception as error:
            give_up(error, record.sweep)
            continue
        for row in read_metrics(folder):
            logger.log_metrics(row, int(row["step"]))
        return logger
    return None


def give_up(error: Exception, sweep: str) -> None:
    """Say that W&B failed, once in a process, and end its service, which may keep the id of a run."""
    global _server_failed
    if not _server_failed:
        said = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        print(f"notice: W&B: {said}; nothing is lost: make sync SWEEP={sweep} uploads it later", file=sys.stderr)
    _server_failed = True
    with contextlib.suppress(Exception):
        import wandb

        wandb.teardown()


def run_id(record: Record, salt: str) -> str:
    """The W&B id: the same when a cell is run again, so that its parts form one run."""
    return fingerprint({"fingerprint": record.fingerprint, "sweep": record.sweep, "cell": record.cell, "salt": salt})
