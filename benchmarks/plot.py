"""Draw what the benchmarks in a folder measured.

.venv/bin/python benchmarks/plot.py results/bench
"""

import argparse
import sys
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from peerscale.errors import UserError, exit_code
from peerscale.figures import style

OURS, THEIRS, LIMIT = style.COLOURS["peer"], style.COLOURS["dense"], "#888888"
AXES = {"experts": "experts", "active_experts": "active experts", "tokens": "tokens in a step"}


def main() -> None:
    """Draw a figure for each table that is there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    drawn = []
    for name, draw in (("peer_step", peer_step_figure), ("growth", growth_figure)):
        if (path := folder / f"{name}.csv").is_file():
            drawn += style.save(draw(pd.read_csv(path)), folder / name)
    if not drawn:
        raise UserError(f"{folder} holds neither peer_step.csv nor growth.csv; to measure them: make bench")
    print(*drawn, sep="\n")


def peer_step_figure(table: pd.DataFrame) -> Figure:
    """Seconds of a step of either implementation against the number of experts, a panel for each kind of step."""
    titles = {
        "none": "forward and backward",
        "dense AdamW, fused": "with fused AdamW in both",
        "AdamW; row-sparse AdamW": "as each trains",
    }
    with style.applied():
        figure, panels = style.panels(len(titles))
        for axes, (optimiser, title) in zip(panels, titles.items(), strict=True):
            for colour, (name, rows) in zip(
                (THEIRS, OURS), table[table["optimiser"] == optimiser].groupby("implementation"), strict=True
            ):
                timed(axes, rows["experts"], rows, colour, str(name))
            axes.set_title(title)
            axes.set_xlabel("experts")
        framed(figure, panels)
        style.caption(
            figure, "d_model 256, 2,048 tokens, 8 heads x top 16, fp32; median, and least to most, of alternating steps"
        )
    return figure


def growth_figure(table: pd.DataFrame) -> Figure:
    """Seconds of a step, and the time to move the rows that it touches, a panel for what varies."""
    with style.applied():
        figure, panels = style.panels(len(AXES))
        for axes, (varied, title) in zip(panels, AXES.items(), strict=True):
            rows = table[table["varied"] == varied]
            timed(axes, rows[varied], rows, OURS, "a step")
            axes.plot(rows[varied], rows["limit_s"], color=LIMIT, linestyle="--", label="moving the rows")
            axes.set_xlabel(title)
        framed(figure, panels)
        style.caption(
            figure,
            "PEER layer, d_model 256, fp32, row-sparse AdamW; else 65,536 experts, 128 active, 2,048 tokens",
            "dashed: the bytes of the touched rows at the rate of reading random rows, measured in the same run",
        )
    return figure


def timed(axes: Axes, x: pd.Series, rows: pd.DataFrame, colour: str, label: str) -> None:
    """Medians, with bars from the least to the most."""
    bars = [rows["median_s"] - rows["min_s"], rows["max_s"] - rows["median_s"]]
    axes.errorbar(x, rows["median_s"], yerr=bars, color=colour, marker="o", markersize=3, linewidth=1.2, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")


def framed(figure: Figure, panels: list[Axes]) -> None:
    """One range of seconds for all panels, so that heights compare, and one legend."""
    limits = [limit for axes in panels for limit in axes.get_ylim()]
    for axes in panels:
        axes.set_ylim(min(limits), max(limits))
    panels[0].set_ylabel("seconds a step")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)


if __name__ == "__main__":
    sys.exit(exit_code(main))
