"""Memory settings of a process. Freed memory is kept, since page faults would take a third of a small model's step; and
garbage collection is off while libraries are imported."""

import contextlib
import ctypes
import gc
from collections.abc import Iterator

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
GIBIBYTE = 1 << 30


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """A context without garbage collection, which would take a fifth of the time of importing torch and Lightning."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def keep_freed_memory() -> None:
    """Make glibc reuse large blocks instead of returning them to the system; without glibc, do nothing.

    Activations and logits of several megabytes are allocated and freed in every step. By default each of these
    allocations takes a system call and new pages.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl and macOS have none
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, GIBIBYTE) or mallopt(M_MMAP_THRESHOLD, GIBIBYTE // 32)  # all that older glibc takes
        mallopt(M_TRIM_THRESHOLD, GIBIBYTE)
