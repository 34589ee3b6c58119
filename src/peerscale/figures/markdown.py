"""Numbers as text, and tables in Markdown."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

Rows = list[dict[str, str]]
"""Rows of a table by its headings."""


def table(rows: Iterable[Mapping[str, str]]) -> list[str]:
    """Lines of a table with one row per mapping, whose keys are the headings; empty without rows."""
    frame = pd.DataFrame([*rows]).fillna("—")
    lines = [[*map(str, frame)], ["---"] * frame.shape[1], *frame.to_numpy().tolist()] if len(frame) else []
    return [f"| {' | '.join(cells)} |" for cells in lines]


def section(title: str, rows: Iterable[Mapping[str, str]], *notes: str) -> list[str]:
    """Lines of a section: heading, table, and notes about the table; empty if the table has no rows."""
    lines = table(rows)
    return [f"## {title}", "", *lines, "", *(line for note in notes if note for line in (note, ""))] if lines else []


def number(value: float | None, form: str = "{:.2f}") -> str:
    """A number as text: a dash for None; 1.2e6 instead of 1.2e+06."""
    return "—" if pd.isna(value) else re.sub(r"e(-?)\+?0?", r"e\1", form.format(value)).replace("-", "−")


def with_interval(value: float | None, interval: Sequence[float | None] | None, form: str = "{:.4g}") -> str:
    """A number with its interval in brackets, or with a note in brackets if it has no interval."""
    if pd.isna(value):
        return "—"
    known = interval is not None and not any(map(pd.isna, interval))
    return number(value, form) + (f" [{', '.join(number(end, form) for end in interval)}]" if known else " [none]")


def plus_minus(found: Mapping[str, Any]) -> str:
    """A difference with half of its interval, `−0.033 ± 0.016`."""
    known = found["low"] is not None and found["high"] is not None
    half = (found["high"] - found["low"]) / 2 if known else None
    return f"{number(found['value'], '{:+.3f}')} ± {number(half, '{:.3f}')}"


def signed_interval(found: Mapping[str, Any] | None) -> str:
    """A difference with its interval, `−0.033 [−0.049, −0.018]`; noted if that includes neither sizes nor seeds."""
    if found is None or found.get("value") is None:
        return "—"
    interval = with_interval(found["value"], (found["low"], found["high"]), "{:+.3f}")
    leaves_out_seeds = found.get("fit_se", 0) is None and found.get("seeds_se", 0) is None
    part = "sequences only" if found.get("rate_se") is None else "without seeds"
    return interval + f" ({part})" * leaves_out_seeds


def probability(p: float | None) -> str:
    """Four decimals, or `< 0.0001`."""
    return "< 0.0001" if p is not None and p < 1e-4 else number(p, "{:.4f}")
