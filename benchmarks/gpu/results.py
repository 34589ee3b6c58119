"""What a phase found, in a folder: one file a phase, written again, whole, after every case.

A case is a name and a function that returns columns of a row. What breaks off a case, at worst the whole process, costs
that case alone: the next call goes on with it, and after some calls that did not survive it leaves it out.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from peerscale.errors import UserError
from peerscale.files import write_json

Row = dict[str, Any]

MOST_TRIES = 2
"""How often a case is begun that ends the process each time."""

RESERVE = 0.05
"""Share of the minutes that is kept for closing down."""


class Case(NamedTuple):
    """One measurement, and the columns that say what of."""

    name: str
    labels: Row
    measure: Callable[[], Row]


class Clock:
    """The time that a call has."""

    def __init__(self, minutes: float) -> None:
        self.begun, self.seconds = time.monotonic(), 60 * minutes

    @property
    def left_s(self) -> float:
        return self.seconds * (1 - RESERVE) - (time.monotonic() - self.begun)


class OutOfTime(Exception):
    """The phase is not finished; the same command goes on."""


class Results:
    """The rows of one phase, by the name of their case.

    Args:
        folder: of all results.
        phase: names the file.
        stamp: what rows depend on; those of another stamp do not count and go with the next write.
    """

    def __init__(self, folder: Path, phase: str, stamp: str = "") -> None:
        self.path, self.stamp = folder / f"{phase}.json", stamp
        kept = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {}
        same = bool(kept) and kept["stamp"] == stamp
        self.rows: dict[str, Row] = {row["case"]: row for row in kept["rows"]} if same else {}
        self.begun: dict[str, int] = kept["begun"] if same else {}
        self.finished: bool = kept["finished"] if same else False

    def add(self, name: str, row: Mapping[str, Any]) -> None:
        """Keep the row of a case."""
        self.rows[name] = {"case": name, **{key: _plain(value) for key, value in row.items()}}
        self.begun.pop(name, None)
        self._write()

    def begin(self, name: str) -> int:
        """Note that a case begins, in case the process does not outlive it; how often it did now."""
        self.begun[name] = self.begun.get(name, 0) + 1
        self._write()
        return self.begun[name]

    def finish(self) -> None:
        """Note that no case is missing."""
        self.finished = True
        self._write()

    def _write(self) -> None:
        rows = [*self.rows.values()]
        write_json(self.path, {"stamp": self.stamp, "finished": self.finished, "begun": self.begun, "rows": rows})


def work_off(results: Results, cases: Iterable[Case], clock: Clock, after: Callable[[], None]) -> None:
    """Measure what is missing, and print a line for each.

    What goes wrong with a case, memory that does not suffice above all, is its row's `reason`.

    Args:
        after: frees the memory of a case; it fails if the device answers no more, which ends the process.

    Raises:
        OutOfTime: the next case might not end in time.
    """
    longest = 0.02 * clock.seconds  # of a case, as far as is known
    for case in cases:
        if case.name in results.rows:
            continue
        if clock.left_s < 1.5 * longest:
            raise OutOfTime
        if results.begin(case.name) > MOST_TRIES:
            row: Row = {"reason": f"left out: {MOST_TRIES} calls did not outlive it"}
        else:
            begun = time.monotonic()
            try:
                row = _measured(case)
            except KeyboardInterrupt:  # no fault of the case
                results.begun.pop(case.name)
                raise
            longest = max(longest, time.monotonic() - begun)
        results.add(case.name, {**case.labels, **row})
        print(f"  {case.name}: {line(row)}", flush=True)
        try:
            after()
        except RuntimeError as error:
            raise UserError(
                f"the device answers no more after {case.name}, whose row is kept ({_first_line(error)}): "
                "the same command goes on in a new process"
            ) from None
    results.finish()


def _measured(case: Case) -> Row:
    try:
        return case.measure()
    except Exception as error:  # whatever it is, the other cases go on
        out_of_memory = "out of memory" in str(error).lower()
        return {"reason": "out of memory" if out_of_memory else f"{type(error).__name__}: {_first_line(error)}"}


def line(row: Row) -> str:
    """A row in one line."""
    shown = {key: value for key, value in row.items() if not isinstance(value, dict | list)}
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()
    )


def read_rows(folder: Path, phase: str) -> list[Row]:
    """The rows of a phase so far; none if it was not begun."""
    path = folder / f"{phase}.json"
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def _plain(value: Any) -> Any:
    """As JSON can hold it: it knows no infinity."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
