"""Keep freed memory in the process: a third of a small model's step is else spent on page faults."""

import ctypes
import ctypes.util
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
GIBIBYTE = 1 << 30


def keep_freed_memory() -> None:
    """Make glibc reuse large blocks in place of giving them back to the system after each use; elsewhere, nothing.

    Activations and logits are some megabytes each, allocated and freed every step, which by default are mapped anew
    each time.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, GIBIBYTE)
        mallopt(M_TRIM_THRESHOLD, GIBIBYTE)
