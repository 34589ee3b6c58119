"""One thread, as in a sweep, set before torch is imported; and no time limits, which a busy machine would break."""

import gc
import os

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
settings.register_profile("any_machine", deadline=None)
settings.load_profile("any_machine")

FIRST = ("test_slurm.py", "test_gpu_script.py", "test_distributed.py", "test_notebooks.py")
"""Tests that wait or take long, so that no worker of pytest-xdist is left alone with them at the end."""

gc.disable()  # while everything is imported, none of which is garbage: some seconds of each worker


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or Triton reports at the end what it was not let free


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in FIRST)
