"""The progress of a sweep, read from its cells' folders, so that it does not depend on what launches them."""

import io
import json
import sys
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from peerscale.errors import UserError
from peerscale.plan.cell import Cell
from peerscale.records.curves import METRICS
from peerscale.records.record import ENDED, RECORD, Status

LIVE_S, LOG_S = 1.0, 30.0
"""Seconds between two updates: on a terminal, and in a log, where each update is a line."""

LINE = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"


class Progress:
    """A context that shows how many cells have ended, which are running, and the time left for all.

    The bar counts training FLOPs, less those of steps that were done before.
    """

    def __init__(self, sweep: str, cells: Sequence[Cell], *, already_done: int = 0) -> None:
        self.sweep, self.cells, self.already_done = sweep, cells, already_done
        self.written_before = {cell.name: _written(cell) for cell in cells}
        self.steps_before = {cell.name: _steps_saved(cell) for cell in cells}
        self.live = sys.stderr.isatty()
        self.bar = tqdm(
            total=sum(cell.plan.flops for cell in cells),
            initial=sum(_work(cell, self.steps_before[cell.name]) for cell in cells),
            bar_format=LINE,
            dynamic_ncols=self.live,
            file=sys.stderr if self.live else io.StringIO(),
        )
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop.set()
        self.thread.join()
        self.bar.leave = not isinstance(error, UserError)  # whose message is enough
        if self.bar.leave:
            self._show()
        self.bar.close()

    def _watch(self) -> None:
        while not self.stop.wait(LIVE_S if self.live else LOG_S):
            self._show()

    def _show(self) -> None:
        self.look()
        if not self.live:
            print(self.bar, file=sys.stderr, flush=True)

    def look(self) -> None:
        """Update the bar from the cells' folders."""
        ended, work, running = self.already_done, 0.0, []
        for cell in self.cells:
            status, row = self._state(cell)
            step = self.steps_before[cell.name]
            if status in ENDED:
                ended, step = ended + 1, cell.plan.steps
            elif row:
                step = max(step, row["step"])
                speed = f"{row['tokens_per_s'] / 1e3:.1f}k tok/s"
                running.append(f"{cell.name} {row['step']}/{cell.plan.steps} loss {row['loss']:.3f} {speed}")
            elif status is Status.RUNNING:
                running.append(f"{cell.name} starting")
            work += _work(cell, step)
        self.bar.set_description_str(f"{self.sweep} {ended}/{self.already_done + len(self.cells)}", refresh=False)
        self.bar.set_postfix_str(" | ".join(running), refresh=False)
        self.bar.n = work
        self.bar.refresh()

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
                return status, json.loads(file.read().splitlines()[-1])
        except (OSError, ValueError, KeyError, IndexError):
            return None, None  # read between two writes; the next update will see it


def _work(cell: Cell, steps: int) -> float:
    """FLOPs of the first steps of a cell."""
    return cell.plan.flops * steps / cell.plan.steps


def _written(cell: Cell) -> int | None:
    """When the record was last written; None if there is no record."""
    path = cell.folder / RECORD
    return path.stat().st_mtime_ns if path.is_file() else None


def _steps_saved(cell: Cell) -> int:
    """The step from which an interrupted cell will continue, from the name of its newest checkpoint."""
    saved = (cell.folder / "checkpoints").glob("step-*.ckpt")
    return max((int(path.stem.removeprefix("step-")) for path in saved), default=0)
