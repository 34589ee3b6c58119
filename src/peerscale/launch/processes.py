"""Cells run at once, each in a process of its own: a process that is killed is replaced, and its cell tried again."""

import itertools
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from typing import Any

from joblib.externals.loky import ProcessPoolExecutor
from joblib.externals.loky.process_executor import TerminatedWorkerError

from peerscale.errors import Aborted
from peerscale.plan.cell import Cell
from peerscale.records.record import Status

TRIES = 3
"""How often a cell is begun whose process is killed each time."""

IDLE_S = 10.0
"""Seconds after which a process without work ends."""

WATCH_S = 1.0
"""Seconds between two looks whether the parent is still there."""


def run_at_once(cells: Sequence[Cell], n: int, run: Callable[[Cell], Status]) -> dict[str, Status]:
    """Run cells in `n` processes; returns their statuses by name.

    Each process has an executor of its own, so that the death of one tells which cell it was running, and leaves the
    others alone.

    Raises:
        UserError: a cell cannot be run as it is; the others stop.
        Aborted: the process of some cell was killed `TRIES` times; all other cells have ended.
    """
    environments = worker_environments(cells, n)
    executors = [_executor(environment) for environment in environments]
    idle, waiting, running = [*range(len(executors))], [*cells], {}
    statuses: dict[str, Status] = {}
    killed: Counter[str] = Counter()
    sigterm = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, or the processes would go on
    try:
        while waiting or running:
            while waiting and idle:
                cell, worker = waiting.pop(0), idle.pop()
                running[executors[worker].submit(run, cell)] = cell, worker
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell, worker = running.pop(future)
                idle.append(worker)
                try:
                    statuses[cell.name] = future.result()
                except TerminatedWorkerError:
                    executors[worker] = _executor(environments[worker])
                    killed[cell.name] += 1
                    if killed[cell.name] < TRIES:
                        print(f"\nnotice: {cell.name} is tried again: its process was killed", file=sys.stderr)
                        waiting.insert(0, cell)
    finally:
        for executor in executors:
            executor.shutdown(kill_workers=True)
        signal.signal(signal.SIGTERM, sigterm)
    if lost := [name for name, times in killed.items() if times == TRIES]:
        raise Aborted(
            f"not all cells could be run: the process of {lost[0]}{' and others' * (len(lost) > 1)} was killed "
            f"{TRIES} times, perhaps since memory ran out; the same command continues each from its checkpoint; fewer "
            "at once need less memory: JOBS=1"
        )
    return statuses


def worker_environments(cells: Sequence[Cell], n: int) -> list[dict[str, str]]:
    """The environment variables of each of at most `n` workers: the GPUs that it sees, if any; too few are shared."""
    n = min(n, len(cells))
    each = max((cell.config.trainer.devices for cell in cells if cell.config.trainer.accelerator != "cpu"), default=0)
    if not each:
        return [{}] * n
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = itertools.cycle(named.split(",") if named else map(str, range(torch.cuda.device_count())))
    return [{"CUDA_VISIBLE_DEVICES": ",".join(itertools.islice(gpus, each))} for _ in range(n)]


def _executor(environment: dict[str, str]) -> Any:
    parent = os.getpid()
    return ProcessPoolExecutor(
        max_workers=1, timeout=IDLE_S, env=environment, initializer=_end_with, initargs=(parent,)
    )


def _end_with(parent: int) -> None:
    """End this process soon after its parent, which may be killed; its cell then goes on from its checkpoint."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
