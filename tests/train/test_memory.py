"""Freed memory is kept: a process that frees and takes 16 MB again and again touches no new pages."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from peerscale.train.memory import keep_freed_memory
def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        tensors = [torch.ones(2**22) for _ in range(2)]
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for choose in (lambda: None, keep_freed_memory):
    choose()
    new_pages()
    print(new_pages())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it sets an option of glibc")
def test_freed_memory_is_kept():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    default, kept = map(int, done.stdout.split())
    assert kept < 100 < 10000 < default
