"""Beyond the paper: the compute-optimal frontier, and the compute multiplier of each method over dense."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from peerscale.figures import style
from peerscale.figures.brackets import bars
from peerscale.stats.curves_of_runs import is_dense


def points_panel(axes: Axes, table: pd.DataFrame, *, colours: Mapping[str, str], intervals: bool = False) -> None:
    """One line per method over the budgets: `table` has name, budget, value, low, high and hollow.

    With intervals, methods are drawn side by side at each budget; on a steep curve that would change their order.
    """
    names = style.ordered(table["name"])
    for i, name in enumerate(names):
        rows = table[table["name"] == name].sort_values("budget")
        x = np.asarray(rows["budget"], float)
        y, low, high = (np.asarray(rows[column], float) for column in ("value", "low", "high"))
        if intervals:
            x = x * 1.035 ** (i - (len(names) - 1) / 2)
            axes.vlines(x, low, high, color=colours[name], linewidth=0.9, label=f"_interval {name}")
        axes.plot(x, y, color=colours[name], linewidth=0.8, alpha=0.6, label=f"_line {name}")
        face = ["white" if flag else colours[name] for flag in rows["hollow"]]
        axes.scatter(x, y, s=10, c=face, edgecolors=colours[name], linewidths=0.9, zorder=3, label=name)
    axes.set(xscale="log", xlabel="training FLOPs")
    style.decade_axis(axes.xaxis, table["budget"])


def frontier_figure(fits: Mapping[str, Any], *, note: str = "") -> Figure | None:
    """The loss at the compute optimum and the compute multiplier over dense, from `fits.json`; None without optima."""
    flagged = style.flagged_minima(fits)
    optima = [
        {"name": m["name"], "budget": entry["budget"], "value": m["loss"], "low": m["low"], "high": m["high"],
         "hollow": (entry["budget"], m["name"]) in flagged}
        for entry in fits["budgets"] for m in entry["methods"] if m["loss"] is not None
    ]  # fmt: skip
    if not optima:
        return None
    worth = [
        {**m, "name": m["method"], "value": m["multiplier"],
         "hollow": style.compares_flagged(flagged, m["budget"], m)}
        for m in fits["multipliers"]
    ]  # fmt: skip
    losses, compared = pd.DataFrame(optima), pd.DataFrame(worth)
    names = style.ordered(losses["name"])
    colours = style.colours(names)
    with style.applied():
        figure, panels = style.panels(2 if worth else 1)
        points_panel(panels[0], losses, colours=colours)
        panels[0].set(ylabel="loss (nats per token)", title="compute-optimal loss")
        if worth:
            points_panel(panels[1], compared, colours=colours, intervals=True)
            panels[1].axhline(1, color=colours.get("dense", style.COLOURS["dense"]), linewidth=0.9, label="_dense")
            panels[1].set(yscale="log", ylabel="compute multiplier", title="dense's FLOPs over the method's")
            style.log_axis(panels[1].yaxis, *panels[1].get_ylim())
        style.method_legend(figure, names)
        marks = "hollow: flagged minimum" if losses["hollow"].any() else ""
        alone = "losses: without intervals"
        if any(map(is_dense, names)):
            alone += "; differences.png shows the differences to dense with theirs"
        same = "multiplier: for the same loss, losses interpolated between the budgets; methods side by side"
        style.caption(figure, note, "; ".join(filter(None, (alone, marks))), *((same, bars(fits)) if worth else ()))
    return figure
