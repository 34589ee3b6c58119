"""Names of this machine and this checkout in records."""

import platform
import subprocess
from pathlib import Path

from peerscale.files import IN_CHECKOUT, ROOT


def cpu_name() -> str:
    """The processor's name, as the system reports it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def git_commit() -> str | None:
    """The checkout's commit, with `+dirty` if tracked files differ from it; None outside a checkout."""
    if not IN_CHECKOUT:
        return None
    describe = ["git", "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+dirty"]
    try:
        return subprocess.run(describe, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
