"""Where files lie, and atomic writing: a file or folder is complete or absent."""

import contextlib
import hashlib
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
"""Whether this package runs from a checkout rather than from an installed wheel."""

ROOT = PACKAGE.parents[1] if IN_CHECKOUT else Path.cwd()
"""The folder of `runs/`, `results/`, `data/` and the user's `sweeps/`: the checkout, or else the current folder."""

OURS = ROOT if IN_CHECKOUT else PACKAGE
"""The folder of `conf/` and the published `sweeps/`: the checkout, or else the package, since the wheel has copies."""


def outside_folders() -> list[Path]:
    """Where the modules and the `conf/` of layers outside peerscale may be: the current folder, those of PYTHONPATH."""
    return [Path(folder) for folder in (".", *os.environ.get("PYTHONPATH", "").split(os.pathsep)) if folder]


def from_checkout(path: Path) -> Path:
    """The path relative to `ROOT`; unchanged if it lies elsewhere."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` at the end, or remove it on an error.

    The file or folder that the block makes there appears at `path` in one step, except that an existing folder is
    moved away first. On an error `path` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    temporary, before = scratch / path.name, scratch / ".before"
    try:
        yield temporary
        if temporary.is_dir() and path.is_dir():
            path.rename(before)
        temporary.replace(path)
    finally:
        if before.exists() and not path.exists():
            before.rename(path)
        shutil.rmtree(scratch, ignore_errors=True)


def finish_replacing(folder: Path) -> None:
    """Put in place the folder that a process had written with `replacing` when it was killed between two renames."""
    for before in folder.parent.glob(f".{folder.name}.*/.before"):
        if not folder.exists():
            (before.parent / folder.name).rename(folder)
            shutil.rmtree(before.parent)


def remove_abandoned(folder: Path) -> None:
    """Remove what killed processes left of `replacing` in `folder`; only safe if no other process writes there."""
    for scratch in folder.glob(".*.????????"):
        if scratch.is_dir():
            shutil.rmtree(scratch)


def checksum(tree: Any) -> str:
    """The SHA-256 of JSON values, whatever the layout of their file."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path` atomically and durably."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON with `write_text`, each list of numbers on one line; raises `ValueError` for NaN."""
    text = json.dumps(value, indent=1, allow_nan=False)
    lists_of_numbers = r"\[\n([^\[\]{}\"]*?)\n\s*\]"  # strings have no line breaks in JSON
    write_text(path, re.sub(lists_of_numbers, lambda found: f"[{' '.join(found[1].split())}]", text) + "\n")
