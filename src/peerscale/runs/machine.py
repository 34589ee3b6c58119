"""What this machine and checkout are called in a record."""

import platform
import subprocess
from pathlib import Path

from peerscale.files import ROOT


def cpu_name() -> str:
    """The processor's name, as the machine tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


POWERCAP = Path("/sys/class/powercap")
"""Where Linux tells the energy that processors have used (RAPL); on many machines for root alone, on others not."""


def energy_counters() -> dict[Path, int] | None:
    """Microjoules that each processor has used since some moment in the past; None where the machine does not tell."""
    try:
        packages = [path for path in POWERCAP.glob("*-rapl:*") if path.name.count(":") == 1]
        return {path: int((path / "energy_uj").read_text()) for path in packages} or None
    except (OSError, ValueError):
        return None


def energy_j(before: dict[Path, int] | None, after: dict[Path, int] | None) -> float | None:
    """Joules that the machine's processors, and all that ran on them, used between two readings."""
    if before is None or after is None or before.keys() != after.keys():
        return None
    used = 0
    for path, start in before.items():
        # A counter begins anew at its range.
        used += after[path] - start if after[path] >= start else after[path] - start + _counter_range(path)
    return used / 1e6


def _counter_range(path: Path) -> int:
    return int((path / "max_energy_range_uj").read_text())


def git_commit() -> str | None:
    """The checkout's commit, with `+dirty` if tracked files differ from it; None outside git."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        return commit + ("+dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
