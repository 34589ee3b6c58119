"""What the C library does with memory that tensors on a CPU free."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's names for them, from malloc.h
_LARGEST_KEPT = 2**25  # the most that glibc takes for the second


def keep_freed_memory() -> None:
    """Let the process keep blocks of up to 32 MB that it frees; a call at its start is enough.

    By default glibc gives them back to the system, and each step of training takes its larger tensors anew, page by
    page and zeroed: up to half the time of a step of a small model. Costs no memory beyond the peak. No effect on other
    C libraries.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
