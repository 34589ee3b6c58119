"""What is found, in one file, results.json, written again after every case; and the archive with which another machine
goes on.

A case that ends the process costs itself alone: the next call tries it again, and after two calls leaves it out.
"""

import json
import math
import tarfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from peerscale.errors import UserError
from peerscale.files import replacing, write_json

Row = dict[str, Any]

MOST_TRIES = 2
ARCHIVE = "gpu.tar.gz"
KEPT = ("results.json", "report.md", "report.png", "triton/**/*", "runs/*/*/record.json", "runs/*/*/metrics.jsonl",
        "runs/*/*/config.yaml", "runs/gpu/*/checkpoints/*.ckpt")  # fmt: skip
"""What the archive holds: results, compiled kernels, and runs with the checkpoints of those that are not finished."""


class OutOfTime(Exception):
    """The call is over; the next one goes on."""


class Clock:
    """The time that a call has; a twentieth of it is kept for closing down."""

    def __init__(self, minutes: float) -> None:
        self.begun, self.seconds = time.monotonic(), 60 * minutes * 0.95

    @property
    def left_s(self) -> float:
        return self.seconds - (time.monotonic() - self.begun)


class Case(NamedTuple):
    """One measurement: its phase and name, some columns of its row, and the function that gives the others."""

    phase: str
    name: str
    labels: Row
    measure: Callable[[], Row]


class Results:
    """The rows of all phases in a folder; raises `UserError` if they are of another device."""

    def __init__(self, folder: Path, device: str) -> None:
        self.path = folder / "results.json"
        kept = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {}
        if kept and kept["device"] != device:
            raise UserError(f"{folder} has results of {kept['device']}, and this is {device}: another --out")
        self.device, self.begun = device, kept.get("begun", {})
        self.rows: dict[str, Row] = {f"{row['phase']}: {row['case']}": row for row in kept.get("rows", [])}

    def table(self, phase: str) -> pd.DataFrame:
        """The rows of a phase."""
        return pd.DataFrame([row for row in self.rows.values() if row["phase"] == phase])

    def best(self, column: str, **labels: object) -> float | None:
        """The highest value of a column among rows with these labels; None where nothing was measured."""
        rows = [row for row in self.rows.values() if labels.items() <= row.items() and column in row]
        return max((row[column] for row in rows), default=None)

    def write(self) -> None:
        write_json(self.path, {"device": self.device, "begun": self.begun, "rows": [*self.rows.values()]})


def work_off(results: Results, cases: Iterable[Case], clock: Clock, after: Callable[[], None]) -> None:
    """Measure what is missing, and print a line for each; what goes wrong with a case is its row's `reason`.

    `after` frees memory, and fails if the device answers no more. Raises `OutOfTime` if the next case might not end.
    """
    longest = 0.02 * clock.seconds  # of a case, as far as is known
    for case in cases:
        key = f"{case.phase}: {case.name}"
        if key in results.rows:
            continue
        if clock.left_s < 1.5 * longest:
            raise OutOfTime
        results.begun[key], begun = results.begun.get(key, 0) + 1, time.monotonic()
        results.write()
        row: Row = {"reason": f"left out: {MOST_TRIES} calls did not outlive it"}
        try:
            if results.begun[key] <= MOST_TRIES:
                row = case.measure()
        except (KeyboardInterrupt, OutOfTime):  # no fault of the case
            results.begun[key] -= 1
            results.write()
            raise
        except Exception as error:  # whatever it is, the other cases go on
            row = {"reason": f"{type(error).__name__}: {_first_line(error)}"}
        longest = max(longest, time.monotonic() - begun)
        row = {name: str(x) if isinstance(x, float) and not math.isfinite(x) else x for name, x in row.items()}
        results.rows[key] = {"phase": case.phase, "case": case.name, **case.labels, **row}
        results.write()
        shown = [f"{name} {x:.4g}" if isinstance(x, float) else f"{name} {x}" for name, x in row.items()]
        print(f"  {key}: {', '.join(shown)[:300]}", flush=True)
        try:
            after()
        except RuntimeError as error:
            raise UserError(f"the device answers no more after {key} ({_first_line(error)}): call again") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def archive(folder: Path) -> Path:
    """DIR/gpu.tar.gz."""
    found = sorted({path for pattern in KEPT for path in folder.glob(pattern) if path.is_file()})
    with replacing(folder / ARCHIVE) as temporary, tarfile.open(temporary, "w:gz") as packed:
        for path in found:
            packed.add(path, str(path.relative_to(folder)))
    return folder / ARCHIVE


def restore(archive: Path, folder: Path) -> None:
    """Go on from an archive; raises `UserError` if the folder has results already."""
    if (folder / "results.json").exists():
        raise UserError(f"{folder} has results already: --from goes on in a new folder")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
