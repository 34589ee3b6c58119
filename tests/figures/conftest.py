"""The synthetic study, for the tests of this folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from synthetic_study import collected_runs  # noqa: F401
