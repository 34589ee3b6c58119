"""Writes the metrics of a cell to `metrics.jsonl` and to Weights & Biases; only this training module imports wandb.

The files of a cell are authoritative; its W&B run is a copy. Rows of `metrics.jsonl` are copied one by one, except
those that the W&B run already has, so that copying can start, stop and continue at any time, online or offline.
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
from peerscale.records.curves import METRICS, read_metrics
from peerscale.records.fingerprint import fingerprint
from peerscale.records.record import FAILED, Record, Status
from peerscale.train.signals import Watch

TIMEOUT_S = 10.0
"""The longest time that a cell waits for a W&B server, at its start and at its end."""

OFFLINE_FOR_S = 600.0
"""After a failure a process does not try a server for this long, so that a sweep waits at most 3 % of its time."""

AXES = ("tokens", "flops")


class WandbError(Exception):
    """The W&B server did not answer in time or refused, or the client failed."""


class WandbRun:
    """The W&B run of a cell. Rows that it already has are not sent again."""

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
            record: the cell's record so far.
            online: log to the server; otherwise only to `directory`.
            timeout_s: how long to wait for the server, here and in `finish`.

        Raises:
            WandbError: the server did not answer, or there is no API key (only if online).
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
        """Log a row of `metrics.jsonl`, and as alerts the signals that begin with it."""
        if row["step"] < self.run.step:
            return
        metrics = {f"train/{key}": value for key, value in row.items() if key not in ("step", *AXES)}
        with client_errors():
            self.run.log({**{axis: row[axis] for axis in AXES}, **metrics}, step=int(row["step"]))
            for kind, text in signals.items():
                self.run.alert(kind, text, level="WARN")

    def finish(self, record: Record) -> None:
        """End the run with the results of `record`; raises `WandbError` if the server did not take all in time."""
        losses = {f"{name}/{key}": value for name, values in record.evaluation.items() for key, value in values.items()}
        summary = {"status": str(record.status), "reason": record.reason}
        # As numbers, so that W&B can sum them.
        summary |= {status: int(record.status is status) for status in FAILED}
        with client_errors():
            self.run.summary.update({**summary, **losses, **record.router, **record.timing})
            self.run.finish(exit_code=0 if record.status is Status.DONE else 1)


def start_run(directory: Path, tracking: Mapping[str, Any], *, online: bool, timeout_s: float, **named: Any) -> Any:
    """Start a run of the client: it prints nothing, measures nothing itself, and waits at most `timeout_s` for a server
    each time."""
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    if online and not wandb.login(prompt=False, verify=False):
        raise WandbError("no API key: .venv/bin/wandb login, or WANDB_API_KEY")
    return wandb.init(
        mode="online" if online else "offline",
        project=tracking["project"],
        entity=tracking["entity"],
        dir=directory,
        # With `resume`, a later `wandb sync` of an offline run would renumber the steps.
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
    """Turn every exception of the client into `WandbError`."""
    try:
        yield
    except WandbError:
        raise
    except Exception as error:  # also a dead client process, a time limit, ...
        raise WandbError(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error


class Tracker:
    """Writes each row to `metrics.jsonl` and to W&B; rows carry step, tokens and flops, and each can be the x axis.

    Problems with a W&B server never stop training; they delay it by at most `TIMEOUT_S` from time to time.
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
        """Close the file and end the W&B run with the results of `record` as its summary. Raises nothing."""
        with contextlib.suppress(OSError):  # harmless, since every row was flushed
            self.file.close()
        if self.run is not None:
            try:
                self.run.finish(record)
            except WandbError as error:
                _give_up(error, self.sweep)
            self.run = None


def cut_back(folder: Path, step: int) -> None:
    """Remove the rows of `metrics.jsonl` after `step`, which a resumed run will write again."""
    if (folder / METRICS).exists():
        kept = [json.dumps(row) + "\n" for row in read_metrics(folder) if row["step"] <= step]
        write_text(folder / METRICS, "".join(kept))


def run_id(record: Record, salt: str) -> str:
    """The W&B id: the same when a cell is run again, so that its parts form one run."""
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
        # Earlier parts hold only rows that the new run also gets: copied at its start, or trained again.
        shutil.rmtree(folder / "wandb", ignore_errors=True)
        try:
            return WandbRun(folder, settings, record, online=online, timeout_s=TIMEOUT_S)
        except WandbError as error:
            _give_up(error, record.sweep)
            import wandb

            wandb.teardown()  # otherwise its service keeps the id
    return None
