"""The progress of a sweep, read from its cells' folders, so that it does not depend on what launches them."""

import json
import sys
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from peerscale.errors import UserError
from peerscale.plan.cells import Cell
from peerscale.records.curves import METRICS
from peerscale.records.record import ENDED, RECORD, Status

LIVE_S, LOG_S = 1.0, 30.0
"""Seconds between two updates: on a terminal, and in a log."""


class Progress:
    """A context that shows how many cells have ended, which are running, and the time left for all."""

    def __init__(self, sweep: str, cells: Sequence[Cell], *, already_done: int = 0) -> None:
        self.sweep, self.cells, self.already_done = sweep, cells, already_done
        self.started = time.monotonic()  # monotonic, so that changing the system clock does not disturb the estimate
        self.written_before = {cell.name: _written(cell) for cell in cells}
        self.steps_before = {cell.name: _steps_saved(cell) for cell in cells}
        self.live = sys.stderr.isatty()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop.set()
        self.thread.join()
        if kind is not None and issubclass(kind, UserError):
            return  # its message is enough
        self._print(end="\n")

    def _watch(self) -> None:
        while not self.stop.wait(LIVE_S if self.live else LOG_S):
            self._print(end="" if self.live else "\n")

    def _print(self, end: str) -> None:
        print(f"\r\033[K{self.line()}" if self.live else self.line(), end=end, file=sys.stderr, flush=True)

    def line(self) -> str:
        """One line: `reproduce 12/50 | peer-d32-3e11-s0 120/367 loss 5.43 21k tok/s | 6 min left`."""
        ended, work, work_done, running = self.already_done, 0.0, 0.0, []
        for cell in self.cells:
            before, step_s = self.steps_before[cell.name], cell.estimate_s / cell.plan.steps
            work += step_s * (cell.plan.steps - before)
            status, row = self._state(cell)
            if status in ENDED:
                ended += 1
                work_done += step_s * (cell.plan.steps - before)
            elif row:
                work_done += step_s * max(0, row["step"] - before)
                speed = f"{row['tokens_per_s'] / 1e3:.1f}k tok/s"
                running.append(f"{cell.name} {row['step']}/{cell.plan.steps} loss {row['loss']:.3f} {speed}")
            elif status is Status.RUNNING:
                running.append(f"{cell.name} starting")
        elapsed = time.monotonic() - self.started
        left = elapsed * (work - work_done) / work_done if work_done else None
        parts = [f"{self.sweep} {ended}/{self.already_done + len(self.cells)}", *running]
        return " | ".join([*parts, f"{duration(left)} left" if left is not None else "time left unknown yet"])

    def _state(self, cell: Cell) -> tuple[Status | None, dict[str, Any] | None]:
        """Status of a cell whose record was written since the start; if it is running, its newest row of metrics."""
        if _written(cell) == self.written_before[cell.name]:
            return None, None
        try:
            status = Status(json.loads((cell.folder / RECORD).read_text(encoding="utf-8"))["status"])
            if status is not Status.RUNNING or not (cell.folder / METRICS).is_file():
                return status, None
            with (cell.folder / METRICS).open("rb") as file:
                file.seek(max(0, file.seek(0, 2) - 4096))
                rows = file.read().splitlines()
            return status, json.loads(rows[-1])
        except (OSError, ValueError, KeyError, IndexError):
            return None, None  # read between two writes; the next update will see it


def _written(cell: Cell) -> int | None:
    """When the record was last written; None if there is no record."""
    path = cell.folder / RECORD
    return path.stat().st_mtime_ns if path.is_file() else None


def _steps_saved(cell: Cell) -> int:
    """The step from which an interrupted cell will continue, from the name of its newest checkpoint."""
    saved = (cell.folder / "checkpoints").glob("step-*.ckpt")
    return max((int(path.stem.removeprefix("step-")) for path in saved), default=0)


def duration(seconds: float) -> str:
    """`45 s`, `6 min`, `3.2 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
