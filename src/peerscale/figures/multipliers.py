"""Compute multipliers: the baseline's compute over a method's for the same loss, by budget."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from peerscale.figures import style
from peerscale.figures.published import DENSE, paper_values
from peerscale.stats.curve import Curve
from peerscale.stats.multiplier import compute_multipliers

COLUMNS = ("method", "reference", "budget", "multiplier", "low", "high", "by_seed")
"""What `fits.json` tells of each multiplier."""
BESIDE = 1.18
"""Factor between the x values of a mean and its seeds."""


@style.applied()
def multipliers_figure(fits: Mapping[str, Any], published: pd.DataFrame) -> Figure | None:
    """Multipliers from `fits.json`, a panel a method, with intervals and dots of seeds; on the right the paper's.

    None if no method has a multiplier at two budgets.
    """
    found, flagged = pd.DataFrame(fits["multipliers"], columns=COLUMNS), style.flagged_minima(fits)
    if found.empty or found.groupby("method")["budget"].nunique().max() < 2:
        return None
    curves = style.ordered(found["method"])
    methods = list(dict.fromkeys(curve.method for curve in curves))
    paper = paper_multipliers(published, methods) if fits["baseline"] == DENSE else {}
    colours = style.colours([*map(Curve, methods), *curves])
    found["hollow"] = [style.compares_flagged(flagged, one["budget"], one) for one in fits["multipliers"]]
    budgets = sorted(found["budget"].unique())
    figure = Figure(figsize=(style.TEXT_WIDTH, 2.8), layout="constrained")
    panels = figure.subplots(1, len(methods) + bool(paper), sharey=True, squeeze=False)[0]
    for axes in panels:
        axes.axhline(1, color=style.GREY, linewidth=0.9)
        axes.set(xscale="log", xlabel="training FLOPs", xmargin=0.12)
    for axes, method in zip(panels, methods, strict=False):
        for curve in (curve for curve in curves if curve.method == method):
            rows = found[found["method"] == curve].sort_values("budget")
            draw_line(axes, rows, str(curve), colours[curve], fits.get("trend_from", 0.0))
        axes.set_title(style.label(Curve(method)), fontsize=8)
        style.decade_axis(axes.xaxis, budgets if len(budgets) < 3 else [b for b in budgets if np.log10(b) % 1 == 0])
    if paper:
        for method, values in paper.items():
            look = {"color": colours[Curve(method)], "label": method, "hollow": True}
            style.points(panels[-1], [*values], [*values.values()], marker="D", line="-", **look)
        panels[-1].set_title("the paper", fontsize=8)
        panels[-1].set_xlim(4.6e18, 2.6e19)
        style.decade_axis(panels[-1].xaxis, [6e18, 2e19])
    panels[0].set(ylabel=f"compute multiplier over {style.label(Curve(fits['baseline']))}", yscale="log")
    style.log_axis(panels[0].yaxis, *panels[0].get_ylim())
    style.method_legend(figure, curves)
    return figure


def draw_line(axes: Axes, rows: pd.DataFrame, name: str, colour: str, start: float) -> None:
    """Draw a line with its error band, and a dot per seed; budgets below `start` stand apart, with bars."""
    apart, line = rows[rows["budget"] < start], rows[rows["budget"] >= start]
    low, high = (line[key].to_numpy(float) for key in ("low", "high"))
    axes.fill_between(line["budget"], low, high, color=colour, alpha=0.2, linewidth=0)
    for part, bars in ((line, None), (apart, (apart["low"], apart["high"]))):
        look: dict[str, Any] = {"color": colour, "hollow": part["hollow"], "label": f"{name} apart" if bars else name}
        if len(part):
            style.points(axes, part["budget"], part["multiplier"], bars=bars, line="none" if bars else "-", **look)
    for budget, seeds in zip(rows["budget"], rows["by_seed"], strict=True):
        if isinstance(seeds, dict):
            axes.scatter([budget * BESIDE] * len(seeds), [*seeds.values()], s=5, color=colour, linewidth=0)


def paper_multipliers(published: pd.DataFrame, methods: Sequence[str]) -> dict[str, dict[float, float]]:
    """The paper's multipliers by method and budget, computed from the perplexities of its Table 1 in the same way."""
    dense, found = paper_values(published, "table 1", DENSE, "ppl_c4"), {}
    budgets = np.array([*dense])
    for method in methods:
        values = paper_values(published, "table 1", method, "ppl_c4")
        if values.keys() == dense.keys():
            reference, own = ((budgets, np.log([*one.values()])) for one in (dense, values))
            found[method] = dict(zip(budgets.tolist(), compute_multipliers(reference, own).tolist(), strict=True))
    return found
