"""All results as Markdown tables, in the units that one reads them in."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpu import correct
from gpu.results import Row, read_rows
from gpu.studies import STUDY

from peerscale.files import write_text
from peerscale.records.record import Status
from peerscale.records.table import read_records


class Column(NamedTuple):
    """A column: its heading, the key of its values, what they are divided by, and their digits."""

    heading: str
    key: str
    unit: float = 0.0
    """0: shown as it is."""
    digits: int = 3


NAME = Column("case", "case")
TIMES = [Column("median ms", "median_s", 1e-3), Column("least", "min_s", 1e-3), Column("most", "max_s", 1e-3)]
WHY = Column("why not", "reason")

TABLES: dict[str, tuple[str, list[Column]]] = {
    "ceilings": (
        "Ceilings: copies (bytes read and written) and matrix products of random numbers",
        [NAME, *TIMES, Column("GB/s", "bytes_per_s", 1e9, 4), Column("TFLOP/s", "flops_per_s", 1e12, 4), WHY],
    ),
    "correct": (
        "Correct: the worst error of each case, over what is allowed (above 1 is wrong)",
        [NAME, Column("checks", "checks"), Column("worst", "worst"), Column("of allowed", "of_allowed", 1), WHY],
    ),
    "kernels": (
        "Kernels: bytes asked for, whether of memory or of a cache, and their rate over a copy's",
        [NAME, *TIMES, Column("GB/s", "bytes_per_s", 1e9, 4), Column("of a copy", "of_copy", 1), WHY],
    ),
    "layer": (
        "Layer: a training step of one PEER layer",
        [NAME, *TIMES, Column("x ours", "times_ours", 1), Column("peak GB", "peak_bytes", 1e9), WHY],
    ),
    "steps": (
        "Steps: whole training steps, bf16",
        [
            NAME, *TIMES, Column("TFLOP/s", "flops_per_s", 1e12), Column("of a bf16 product", "of_product", 1),
            Column("peak GB", "peak_bytes", 1e9), Column("planned GB", "planned_bytes", 1e9), WHY,
        ],
    ),
    "resume": (
        "Resume: largest distance of any loss from a straight run's, in nats",
        [
            Column("method", "method"), Column("losses", "losses"), Column("resumed", "resumed_from_straight", 1),
            Column("another straight run", "straight_from_straight", 1), Column("verdict", "verdict"), WHY,
        ],
    ),
    "studies": (
        f"Studies: parts of `{STUDY}` that are finished, and the cells that were done by then",
        [NAME, Column("cells", "done_cells"), Column("FLOPs", "done_flops", 1), Column("failed", "failed_cells"), WHY],
    ),
}  # fmt: skip


def render(folder: Path) -> str:
    """Every table that has rows, under the verdict; written to DIR/tables.md too."""
    versions = next((row for row in read_rows(folder, "ceilings") if row["case"] == "versions"), {})
    said = ", ".join(f"{key} {value}" for key, value in versions.items() if key != "case")
    parts = ["# On a GPU", f"{said}.", f"Correctness: {correct.verdict(folder)[1]}."]
    for phase, (title, columns) in TABLES.items():
        rows = [row for row in read_rows(folder, phase) if row["case"] != "versions"]
        if phase == "layer":
            rows = [_beside_ours(row, rows) for row in rows]
        if rows:
            parts += [f"## {title}", table(rows, columns)]
    if cells := _cells(folder):
        parts += [f"## Cells of `{STUDY}`", table(cells, CELLS)]
    text = "\n\n".join(parts) + "\n"
    write_text(folder / "tables.md", text)
    return text


CELLS = [
    Column("cell", "cell"), Column("status", "status"), Column("loss, nats", "loss", 1, 4),
    Column("seconds", "wall_s", 1), Column("TFLOP/s, among others", "flops_per_s", 1e12), WHY,
]  # fmt: skip


def _cells(folder: Path) -> list[Row]:
    rows = []
    for record in read_records(folder / "runs" / STUDY):
        row: Row = {"cell": record.cell, "status": str(record.status), "reason": record.reason, **record.timing}
        if record.status is Status.DONE:
            row["loss"] = next(iter(record.evaluation.values()))["loss"]
        rows.append(row)
    return rows


def _beside_ours(row: Row, rows: Sequence[Row]) -> Row:
    """With the time as a multiple of peerscale's at the same shape, where both are known."""
    shape = row["case"].removesuffix(f" {row.get('implementation')}")
    ours = [other["median_s"] for other in rows if other["case"] == f"{shape} peerscale" and "median_s" in other]
    return {**row, "times_ours": row["median_s"] / ours[0]} if ours and "median_s" in row else row


def table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """A Markdown table, without columns that have no value."""
    kept = [column for column in columns if any(row.get(column.key) not in (None, "") for row in rows)]
    lines = [[column.heading for column in kept], ["---"] * len(kept)]
    lines += [[_shown(row.get(column.key), column) for column in kept] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _shown(value: Any, column: Column) -> str:
    if value is None:
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool) and column.unit:
        return f"{value / column.unit:.{column.digits}g}"
    return str(value).replace("|", "/")
