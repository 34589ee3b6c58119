"""Freed memory is kept by a process that trains, since page faults would take a third of a small model's step."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
GIBIBYTE = 1 << 30


def keep_freed_memory() -> None:
    """Make glibc reuse large blocks instead of returning them to the system; without glibc, do nothing.

    Activations and logits of several megabytes are allocated and freed in every step. By default each of these
    allocations takes a system call and new pages.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl and macOS have none
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, GIBIBYTE) or mallopt(M_MMAP_THRESHOLD, GIBIBYTE // 32)  # all that older glibc takes
        mallopt(M_TRIM_THRESHOLD, GIBIBYTE)
