"""The program of a rank that `distributed.launch` starts: trains the cell in the file that its argument names."""

import contextlib
import os
import pickle
import signal
import sys
import threading
import time
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

from peerscale.errors import FAILED_CELLS, INTERRUPTED
from peerscale.plan.cells import Cell
from peerscale.records.record import Status
from peerscale.train.memory import uncollected


@record  # reports an exception to the launcher
def run_rank(path: Path) -> int:
    """Train the cell, and return the exit code of this rank."""
    with uncollected():  # takes some seconds, in which signals are already handled
        from peerscale.train.cell import train_cell

    cell: Cell = pickle.loads(path.read_bytes())
    try:
        status = train_cell(cell)
    except KeyboardInterrupt:
        return INTERRUPTED
    return FAILED_CELLS if status is Status.FAILED else 0


def main() -> None:
    """Run the rank; end at once if it fails, without waiting for threads of broken connections."""
    threading.Thread(target=_end_with, args=[os.getppid()], daemon=True).start()
    for number in (signal.SIGUSR1, signal.SIGUSR2):  # Slurm sends its warnings to all processes of a job
        signal.signal(number, signal.SIG_IGN)
    code: int | None = 1
    with contextlib.suppress(Exception):
        code = run_rank(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def _end_with(launcher: int) -> None:
    """End this process if its launcher was killed."""
    while os.getppid() == launcher:
        time.sleep(0.2)
    os._exit(1)


if __name__ == "__main__":
    main()
