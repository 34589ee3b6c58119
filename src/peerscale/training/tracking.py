"""Metrics of a cell, to `metrics.jsonl` and to Weights & Biases; the only training module that imports wandb.

The files of a cell are the truth, its W&B run a copy. The copy is made row by row from `metrics.jsonl` and leaves out
what is there already, so that it can be begun, broken off and taken up again at any time, online or off.
"""

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from peerscale.files import write_text
from peerscale.layers.registry import parse_layer
from peerscale.runs.curves import METRICS, read_metrics
from peerscale.runs.fingerprint import fingerprint
from peerscale.runs.record import FAILED, Record, Status
from peerscale.training.signals import Watch

TIMEOUT_S = 10.0
"""Longest that a cell waits for a W&B server, at its start and at its end."""

OFFLINE_FOR_S = 600.0
"""After a failure a process tries no server for this long, so that waiting costs a sweep 3 % at most."""

AXES = ("tokens", "flops")


class WandbError(Exception):
    """The W&B server did not answer in time or refused, or the client broke."""


class WandbRun:
    """The W&B run of a cell. Rows that it has already are not sent again."""

    def __init__(
        self,
        directory: Path,
        settings: Mapping[str, Any],
        record: Record,
        *,
        online: bool,
        timeout_s: float,
    ) -> None:
        """Start the run, or continue it.

        Args:
            directory: where the client keeps its files, under `wandb/`.
            settings: the cell's whole configuration.
            record: the cell's record, as far as it is known.
            online: at the server, else in `directory` only.
            timeout_s: how long to wait for the server, here and in `finish`.

        Raises:
            WandbError: online, and no answer, or no API key.
        """
        tracking = settings["tracking"]
        with client_errors():
            self.run = start_run(
                directory,
                tracking,
                online=online,
                timeout_s=timeout_s,
                id=run_id(record, tracking["id_salt"]),
                name=record.cell,
                group=record.sweep,
                job_type="train",
                tags=[record.sweep, record.method, record.size, *tracking["tags"]],
                config={**settings, "derived": record.plan},
            )
            for axis in AXES:
                self.run.define_metric(axis)
            self.run.define_metric("train/*", step_metric="tokens")

    def log(self, row: Mapping[str, float], signals: Mapping[str, str]) -> None:
        """A row of `metrics.jsonl`, and the signals that begin with it as alerts."""
        if row["step"] < self.run.step:
            return
        metrics = {f"train/{key}": value for key, value in row.items() if key not in ("step", *AXES)}
        with client_errors():
            self.run.log({**{axis: row[axis] for axis in AXES}, **metrics}, step=int(row["step"]))
            for kind, text in signals.items():
                self.run.alert(kind, text, level="WARN")

    def finish(self, record: Record) -> None:
        """End with what the record says; raises `WandbError` if the server did not take everything in time."""
        losses = {f"{name}/{key}": value for name, values in record.evaluation.items() for key, value in values.items()}
        summary = {"status": str(record.status), "reason": record.reason, "signals": record.signals}
        # As numbers, which W&B can sum.
        summary |= {status: int(record.status is status) for status in FAILED}
        with client_errors():
            self.run.summary.update({**summary, **losses, **record.router, **record.timing})
            self.run.finish(exit_code=0 if record.status is Status.DONE else 1)


def start_run(directory: Path, tracking: Mapping[str, Any], *, online: bool, timeout_s: float, **named: Any) -> Any:
    """The client's own run, quiet, measuring nothing itself, and never waiting for a server longer than `timeout_s`."""
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    if online and not wandb.login(prompt=False, verify=False):
        raise WandbError("no API key: .venv/bin/wandb login, or WANDB_API_KEY")
    return wandb.init(
        mode="online" if online else "offline",
        project=tracking["project"],
        entity=tracking["entity"],
        dir=directory,
        # Offline, `resume` would make a later `wandb sync` renumber the steps.
        resume="allow" if online else None,
        reinit="create_new",
        settings=wandb.Settings(
            console="off",
            silent=True,
            x_disable_stats=True,
            x_disable_meta=True,
            init_timeout=timeout_s,
            finish_timeout=timeout_s,
            finish_timeout_raises=True,
        ),
        **named,
    )


@contextlib.contextmanager
def client_errors() -> Iterator[None]:
    """Whatever the client raises comes out as `WandbError`."""
    try:
        yield
    except WandbError:
        raise
    except Exception as error:  # also its process that died, a time limit, ...
        raise WandbError(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error


class Tracker:
    """Writes each row to `metrics.jsonl` and to W&B; rows carry step, tokens and flops, and each can be the x axis.

    Nothing that a W&B server does stops training, or holds it up for more than `TIMEOUT_S` now and then.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], record: Record) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        kept = list(read_metrics(folder))
        self.file = (folder / METRICS).open("a", encoding="utf-8")
        self.watch = Watch(*parse_layer(settings["ffn"]).routed())
        self.signals: list[str] = []
        self.sweep = record.sweep
        self.run = _start(folder, settings, record)
        for row in kept:
            self._copy(row)

    def log(self, row: Mapping[str, float]) -> None:
        """One row of training metrics."""
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        self._copy(row)

    def _copy(self, row: Mapping[str, float]) -> None:
        begun = self.watch.see(row)
        self.signals += begun.values()
        if self.run is not None:
            try:
                self.run.log(row, begun)
            except WandbError as error:
                _give_up(error, self.sweep)
                self.run = None

    def finish(self, record: Record) -> None:
        """Close both; the W&B run's summary is the record's results. Raises nothing."""
        with contextlib.suppress(OSError):  # every row was flushed
            self.file.close()
        if self.run is not None:
            try:
                self.run.finish(record)
            except WandbError as error:
                _give_up(error, self.sweep)
            self.run = None


def cut_back(folder: Path, step: int) -> None:
    """Drop the rows of `metrics.jsonl` after `step`, which a resumed run writes again."""
    if (folder / METRICS).exists():
        kept = [json.dumps(row) + "\n" for row in read_metrics(folder) if row["step"] <= step]
        write_text(folder / METRICS, "".join(kept))


def run_id(record: Record, salt: str) -> str:
    """The W&B id: the same for a cell run again, so that its pieces join."""
    return fingerprint({"fingerprint": record.fingerprint, "sweep": record.sweep, "cell": record.cell, "salt": salt})


_offline_until = 0.0


def _give_up(error: WandbError, sweep: str) -> None:
    global _offline_until
    if not _offline_until:
        print(f"notice: W&B: {error}; nothing is lost: make sync SWEEP={sweep} uploads it later", file=sys.stderr)
    _offline_until = time.monotonic() + OFFLINE_FOR_S


def _start(folder: Path, settings: Mapping[str, Any], record: Record) -> WandbRun | None:
    mode = settings["tracking"]["mode"]
    choices = {"disabled": [], "offline": [False], "online": [True, False]}[mode]
    for online in choices:
        if online and time.monotonic() < _offline_until:
            continue
        # Earlier pieces are copies of rows that the new one begins with, or that are trained again.
        shutil.rmtree(folder / "wandb", ignore_errors=True)
        try:
            return WandbRun(folder, settings, record, online=online, timeout_s=TIMEOUT_S)
        except WandbError as error:
            _give_up(error, record.sweep)
            import wandb

            wandb.teardown()  # its service would hold the id
    return None
