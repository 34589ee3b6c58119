"""Beyond the paper: the compute-optimal frontier, what a method is worth in dense compute, and loss against time."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from peerscale.laws.isoflop import VertexStatus
from peerscale.laws.multiplier import compute_multipliers
from peerscale.runs.fits import RESAMPLES, isoflop_fits
from peerscale.runs.study import method_names, usable
from peerscale.viz import style
from peerscale.viz.isoflop import missing_note

REACH = 20.0
"""Beyond this factor on dense's compute a multiplier, a far extrapolation, is drawn at the panel's edge."""


def frontier_table(runs: pd.DataFrame) -> pd.DataFrame:
    """The loss at each method's compute optimum, and the effective-compute multiplier over dense.

    Returns:
        One row per method and budget with a minimum: name, budget, loss, loss_low, loss_high (nats per token),
        multiplier, low, high, flagged (its minimum is), extrapolated (beyond dense's budgets). Intervals are 95 %, from
        a bootstrap of the points about their parabolas. Multipliers are NaN with fewer than two unflagged budgets of
        dense.
    """
    fits = isoflop_fits(runs, "flops_per_token", bootstrap=RESAMPLES)
    table, unknown = [], (np.nan, np.nan)
    for name in style.ordered(fits):
        found = compute_multipliers(fits["dense"], fits[name]) if "dense" in fits and name != "dense" else ()
        by_budget = {multiplier.budget: multiplier for multiplier in found}
        for vertex in (vertex for vertex in fits[name].vertices if vertex.is_minimum):
            worth = by_budget.get(vertex.budget)
            multiplier = (worth.multiplier, *(worth.interval or unknown)) if worth else (np.nan, *unknown)
            loss = (vertex.loss, *(vertex.loss_interval or unknown))
            flags = (vertex.status is not VertexStatus.OK, bool(worth and worth.extrapolated))
            table.append((name, vertex.budget, *loss, *multiplier, *flags))
    columns = "name budget loss loss_low loss_high multiplier low high flagged extrapolated"
    return pd.DataFrame(table, columns=columns.split())


def points_panel(
    axes: Axes, table: pd.DataFrame, columns: tuple[str, str, str], hollow: pd.Series, *, colours: Mapping[str, str]
) -> None:
    """A line a method over the budgets of `frontier_table`, from its `columns` middle, low and high.

    Methods stand side by side at each budget; `hollow` says which rows are flagged.
    """
    names = style.ordered(table["name"])
    for i, name in enumerate(names):
        rows = table[table["name"] == name].sort_values("budget")
        x = np.asarray(rows["budget"], float) * 1.035 ** (i - (len(names) - 1) / 2)
        y, low, high = (np.asarray(rows[column], float) for column in columns)
        axes.plot(x, y, color=colours[name], linewidth=0.8, alpha=0.6, label=f"_line {name}")
        axes.vlines(x, low, high, color=colours[name], linewidth=0.9, label=f"_interval {name}")
        face = ["white" if flag else colours[name] for flag in hollow[rows.index]]
        axes.scatter(x, y, s=18, c=face, edgecolors=colours[name], linewidths=0.9, zorder=3, label=name)
    axes.set(xscale="log", xlabel="training FLOPs")
    style.decade_axis(axes.xaxis, table["budget"])


def frontier_figure(table: pd.DataFrame, *, note: str = "") -> Figure:
    """The loss at the compute optimum, and how many times the FLOPs dense needs for it; from `frontier_table`."""
    names = style.ordered(table["name"])
    colours = style.colours(names)
    compared = table[table["multiplier"].notna()]
    with style.applied():
        figure, panels = style.panels(2 if len(compared) else 1)
        points_panel(panels[0], table, ("loss", "loss_low", "loss_high"), table["flagged"], colours=colours)
        panels[0].set(ylabel="loss (nats per token)", title="compute-optimal loss")
        if len(compared):
            hollow = compared["flagged"] | compared["extrapolated"]
            points_panel(panels[1], compared, ("multiplier", "low", "high"), hollow, colours=colours)
            panels[1].axhline(1, color=colours["dense"], linewidth=0.9, label="_dense")
            panels[1].set(yscale="log", ylabel="times the FLOPs", title="what dense needs for that loss")
            panels[1].set_ylim(*np.clip(panels[1].get_ylim(), 1 / REACH, REACH))
            style.log_axis(panels[1].yaxis, *panels[1].get_ylim())
        style.method_legend(figure, names)
        bars = "bars: 95 %, bootstrap of the points about their parabolas, so seeds as far as they scatter them"
        marks = "hollow: flagged minimum" + (", or beyond dense's budgets" if len(compared) else "")
        style.caption(figure, note, bars, f"{marks}; side by side at each budget")
    return figure


SPENT = {
    "budget": ("equal compute", "training FLOPs"),
    "wall_s": ("equal time", "training time (s)"),
    "bytes_moved": ("equal memory traffic", "bytes of parameters moved"),
    "energy_j": ("equal energy", "energy of the machine (J)"),
}
"""What a loss may be paid with: a panel's title and axis."""


def time_figure(runs: pd.DataFrame, *, note: str = "") -> Figure:
    """Each cell's loss against each of `SPENT` that all cells tell, with each method's lower envelope."""
    cells = runs.assign(name=method_names(runs))[usable(runs)]
    names = style.ordered(cells["name"])
    colours, markers = style.colours(names), style.markers(cells["budget"])
    with style.applied():
        told = [x for x in SPENT if x in cells and cells[x].notna().all()]
        figure, panels = style.panels(len(told))
        for axes, x in zip(panels, told, strict=True):
            axes.set(title=SPENT[x][0], xlabel=SPENT[x][1], xscale="log")
            axes.sharey(panels[0])
            for name in names:
                rows = cells[cells["name"] == name].sort_values(x)
                for budget, at_budget in rows.groupby("budget"):
                    axes.plot(
                        at_budget[x], at_budget["val_loss"], markers[float(str(budget))], color=colours[name],
                        alpha=0.35, markersize=3.5, markeredgewidth=0, label=f"_cells {name}",
                    )  # fmt: skip
                front = envelope(rows, x)
                axes.plot(front[x], front["val_loss"], color=colours[name], label=name)
            if x == "budget":
                style.decade_axis(axes.xaxis, cells["budget"])
            else:
                style.log_axis(axes.xaxis, *axes.get_xlim())
        panels[0].set_ylabel("validation loss (nats per token)")
        style.method_legend(figure, names)
        lines = "points: all cells, markers by budget; lines: each method's lowest loss for at most so much of it"
        how = f"kernel {style.listed(cells['kernel'])}, threads a cell {style.listed(cells['n_threads'])}"
        clock = f"time: of the machine that ran the cells, without evaluation; {how}"
        moved = "bytes: parameters, gradients and AdamW's moments, as if nothing stayed in a cache; no activations"
        style.caption(figure, note, lines, clock, moved if "bytes_moved" in told else "", missing_note(runs))
    return figure


def envelope(rows: pd.DataFrame, x: str) -> pd.DataFrame:
    """The rows, by `x`, whose loss is below that of every row with a smaller `x`."""
    rows = rows.sort_values([x, "val_loss"])
    return rows[rows["val_loss"] < rows["val_loss"].cummin().shift(fill_value=np.inf)]
