"""Beyond the paper: the compute-optimal frontier, and the compute multiplier of each method over the baseline."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from peerscale.figures import style
from peerscale.stats.curve import Curve


def frontier_panel(axes: Axes, table: pd.DataFrame, colours: Mapping[Curve, str], *, bars: bool = False) -> None:
    """One line per method over the budgets: `table` has name, budget, value, low, high and hollow.

    With bars, methods are drawn side by side at each budget; on a steep curve that would change their order.
    """
    curves = style.ordered(table["name"])
    for i, curve in enumerate(curves):
        rows = table[table["name"] == curve].sort_values("budget")
        x = rows["budget"] * 1.035 ** ((i - (len(curves) - 1) / 2) * bars)
        ends = (rows["low"], rows["high"]) if bars else None
        look: dict[str, Any] = {"color": colours[curve], "label": str(curve), "line": "-", "hollow": rows["hollow"]}
        style.points(axes, x, rows["value"], bars=ends, **look)
    axes.set(xscale="log", xlabel="training FLOPs")
    style.decade_axis(axes.xaxis, table["budget"])


@style.applied()
def frontier_figure(fits: Mapping[str, Any]) -> Figure | None:
    """The loss at the compute optimum and the compute multiplier over the baseline; None without optima."""
    flagged = style.flagged_minima(fits)
    losses = pd.DataFrame([
        {**m, "budget": entry["budget"], "value": m["loss"], "hollow": (entry["budget"], m["name"]) in flagged}
        for entry in fits["budgets"] for m in entry["methods"] if m["loss"] is not None
    ])  # fmt: skip
    if losses.empty:
        return None
    worth = pd.DataFrame([
        {**m, "name": m["method"], "value": m["multiplier"], "hollow": style.compares_flagged(flagged, m["budget"], m)}
        for m in fits["multipliers"]
    ])  # fmt: skip
    curves = style.ordered(losses["name"])
    colours = style.colours(curves)
    figure, panels = style.panels(1 if worth.empty else 2)
    frontier_panel(panels[0], losses, colours)
    panels[0].set(ylabel="loss (nats per token)", title="compute-optimal loss")
    if len(worth):
        frontier_panel(panels[1], worth, colours, bars=True)
        panels[1].axhline(1, color=style.GREY, linewidth=0.9, label="_baseline")
        panels[1].set(
            yscale="log",
            ylabel="compute multiplier",
            title=f"{style.label(Curve(fits['baseline']))}'s FLOPs over the method's",
        )
        style.log_axis(panels[1].yaxis, *panels[1].get_ylim())
    style.method_legend(figure, curves)
    return figure
