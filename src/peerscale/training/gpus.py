"""Which GPUs of a machine a worker has, beside other workers."""

import itertools
import os
import tempfile
from pathlib import Path

import torch
from filelock import FileLock, Timeout

VISIBLE = "CUDA_VISIBLE_DEVICES"

_held: list[FileLock] = []
"""Of the GPUs that this process has taken, until it ends."""


def take_gpus(n: int) -> None:
    """Let this process see `n` GPUs only, those that the fewest other workers of the machine have taken.

    To be called before CUDA is used; a second call changes nothing. Where there are no more than `n`, all are seen.
    """
    named = os.environ.get(VISIBLE)
    gpus = named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
    if _held or len(gpus) <= n:
        return
    for place in itertools.count():  # with more workers than GPUs several share one
        taken = {}
        for gpu in gpus:
            lock = FileLock(Path(tempfile.gettempdir(), f"peerscale-gpu-{gpu}-{place}.lock"))
            try:
                taken[gpu] = lock.acquire(timeout=0).lock
            except Timeout:
                continue
            if len(taken) == n:
                _held.extend(taken.values())
                os.environ[VISIBLE] = ",".join(taken)
                return
        for lock in taken.values():
            lock.release()
