"""One thread, as in a sweep, set before torch is imported; and no time limits, which a busy machine would break."""

import gc
import os

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
settings.register_profile("any_machine", deadline=None)
settings.load_profile("any_machine")

gc.disable()  # while everything is imported, none of which is garbage: some seconds of each worker


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()
