"""Assignment of a machine's GPUs to workers that run at the same time."""

import itertools
import os
import tempfile
from pathlib import Path

import torch
from filelock import FileLock, Timeout

VISIBLE = "CUDA_VISIBLE_DEVICES"

_held: list[FileLock] = []
"""Locks of the GPUs that this process has taken, held until it ends."""


def take_gpus(n: int) -> None:
    """Make only `n` GPUs visible to this process: those that the fewest other workers of this user have taken.

    Must be called before CUDA is used; a second call has no effect. If there are at most `n` GPUs, all stay visible.
    """
    named = os.environ.get(VISIBLE)
    gpus = named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
    if _held or len(gpus) <= n:
        return
    for place in itertools.count():  # if there are more workers than GPUs, several share one
        taken = {}
        for gpu in gpus:
            # The file remains, and another user may not open it, so every user has files of their own.
            lock = FileLock(Path(tempfile.gettempdir(), f"peerscale-gpu-{os.getuid()}-{gpu}-{place}.lock"))
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
