"""One thread, as in a sweep, set before torch is imported; and no time limits, which a busy machine would break."""

import os

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
settings.register_profile("any_machine", deadline=None)
settings.load_profile("any_machine")
