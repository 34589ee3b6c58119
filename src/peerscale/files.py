"""Atomic writing: a file or folder is there whole, or not at all."""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent
IN_CHECKOUT = (PACKAGE.parents[1] / "conf").is_dir()
"""Whether this is a checkout, and not installed from a wheel."""

ROOT = PACKAGE.parents[1] if IN_CHECKOUT else Path.cwd()
"""Where `runs/`, `results/`, `data/` and the user's own `sweeps/` lie: the checkout, or else the current folder."""

OURS = ROOT if IN_CHECKOUT else PACKAGE
"""Where `conf/` and the published `sweeps/` lie: the checkout, or else the package, as the wheel has them too."""


def from_checkout(path: Path) -> Path:
    """The path as a user types it in the checkout; as it is if it lies elsewhere."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, renamed onto it at the end; removed, with `path` untouched, on an error.

    Whatever the block makes there, a file or a folder, appears at `path` in one step. A folder replaces an existing
    one only by removing that first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    temporary = scratch / path.name
    try:
        yield temporary
        if temporary.is_dir() and path.is_dir():
            shutil.rmtree(path)
        temporary.replace(path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def remove_abandoned(folder: Path) -> None:
    """Remove what `replacing` left in `folder` when its process was killed; for who alone writes there."""
    for scratch in folder.glob(".*.????????"):
        if scratch.is_dir():
            shutil.rmtree(scratch)


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path` atomically and durably."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON to `path` as `write_text` does, a list of numbers on one line; `ValueError` on NaN."""
    text = json.dumps(value, indent=1, allow_nan=False)
    lists_of_numbers = r"\[\s+([^\[\]{}\"]*?)\s+\]"
    write_text(path, re.sub(lists_of_numbers, lambda found: f"[{' '.join(found[1].split())}]", text) + "\n")
