"""All results as one table, report.md, and one page of figures, report.png."""

from pathlib import Path

import pandas as pd
from gpu import correct
from gpu.results import Results

from peerscale.figures.markdown import number, table
from peerscale.files import replacing, write_text
from peerscale.records.record import Status
from peerscale.records.table import read_records

COLUMNS = {"median_s": ("ms", 1e-3), "bytes_per_s": ("GB/s", 1e9), "flops_per_s": ("TFLOP/s", 1e12),
           "of_ceiling": ("of the ceiling", 1), "of_allowed": ("error over allowed", 1), "peak_bytes": ("peak GB", 1e9),
           "planned_bytes": ("planned GB", 1e9), "resumed_from_straight": ("resumed less straight", 1),
           "straight_from_straight": ("straight less straight", 1), "done_cells": ("cells", 1)}  # fmt: skip
"""Columns of results: heading and unit."""


def write(results: Results, folder: Path) -> str:
    """Write both and return the table."""
    rows = pd.DataFrame([*results.rows.values()])
    shown = pd.DataFrame({"case": rows["phase"] + ": " + rows["case"]}) if len(rows) else pd.DataFrame()
    for column, (heading, unit) in COLUMNS.items():
        if column in rows:
            shown[heading] = [number(value / unit, "{:.3g}") for value in pd.to_numeric(rows[column], errors="coerce")]
    if "reason" in rows:
        shown["why not"] = rows["reason"].fillna("")
    title = ["# On a GPU", "", f"{results.device}. Correctness: {correct.verdict(results)[1]}.", ""]
    text = "\n".join([*title, *table(shown.to_dict("records"))]) + "\n"
    write_text(folder / "report.md", text)
    draw(results, folder)
    return text


def draw(results: Results, folder: Path) -> None:
    """Shares of the ceilings of kernels and of whole steps, and losses of the study by size."""
    import altair as alt

    panels = []
    for phase in ("kernels", "steps"):
        found = results.table(phase)
        if "of_ceiling" in found and found["of_ceiling"].notna().any():
            bars = alt.Chart(found[["case", "of_ceiling"]].dropna(), title=phase).mark_bar()
            panels.append(bars.encode(x=alt.X("of_ceiling", title="share of the ceiling"), y=alt.Y("case", title=None)))
    done = [record for record in read_records(folder / "runs" / "gpu") if record.status is Status.DONE]
    runs = [
        {"method": record.method, "budget": f"{record.budget:.0e}", "loss": record.evaluation["validation"]["loss"],
         "FLOPs per token": sum(record.flops_per_token.values())} for record in done
    ]  # fmt: skip
    if runs:
        x, y = alt.X("FLOPs per token", scale=alt.Scale(type="log")), alt.Y("loss", scale=alt.Scale(zero=False))
        lines = alt.Chart(pd.DataFrame(runs), title="validation loss").mark_line(point=True)
        panels.append(lines.encode(x=x, y=y, color="method", strokeDash="budget"))
    if panels:
        with replacing(folder / "report.png") as temporary:
            alt.hconcat(*panels).save(str(temporary), format="png")
