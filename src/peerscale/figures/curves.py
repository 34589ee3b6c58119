"""Training loss against the compute spent."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from peerscale.figures import style
from peerscale.stats.curves_of_runs import method_names, same_variant, usable

SKIPPED_SHARE = 0.08
"""Share of the budget before which a curve is not drawn: the first steps are uninformative but would set the scale."""

SMOOTHED = 5
"""Points of a curve over which a distance to dense is averaged, since the training loss of single batches scatters."""


@style.applied()
def curves_figure(curves: pd.DataFrame, runs: pd.DataFrame) -> Figure:
    """One column per budget: above, each method's run with the lowest validation loss; below, its distance to dense's.

    `curves` and `runs` are the study's tables; runs without a curve are left out. There is no lower row without dense.
    """
    runs = runs.assign(name=method_names(runs))
    drawn = runs[usable(runs)]
    budgets = sorted((runs if drawn.empty else drawn)["budget"].unique())
    names = style.ordered(drawn["name"])
    colours = style.colours(names)
    rows = 1 + (len(names) > 1 and any(same_variant("dense", name, names) for name in names))
    figure = Figure(figsize=(style.TEXT_WIDTH, 2.2 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, len(budgets), sharex="col", sharey="row", squeeze=False)
    for column, budget in zip(panels.T, budgets, strict=True):
        finished = drawn[drawn["budget"] == budget]
        lowest = finished.loc[finished.groupby("name")["val_loss"].idxmin()].set_index("name")["cell"]
        best = {name: curves[curves["cell"] == lowest[name]] for name in style.ordered(lowest.index)}
        start = SKIPPED_SHARE * budget
        for name, curve in best.items():
            late = curve[curve["flops"] >= start]
            column[0].plot(late["flops"], late["loss"], color=colours[name], linewidth=0.9, label=name)
        if rows > 1:
            draw_distances(column[1], best, colours, start)
        column[0].set(xscale="log", xlim=(0.9 * start, 1.1 * budget), title=style.budget_title(budget))
        column[-1].set_xlabel("FLOPs spent")
        style.decade_axis(column[-1].xaxis)
    panels[0, 0].set_ylabel("training loss (nats per token)")
    if rows > 1:
        panels[1, 0].set_ylabel("loss minus dense's (nats per token)")
    style.method_legend(figure, names)
    return figure


def draw_distances(axes: Axes, best: dict[str, pd.DataFrame], colours: Mapping[str, str], start: float) -> None:
    """Draw each curve minus dense's at the same FLOPs (log-linear between points), from `start` FLOPs on."""
    axes.axhline(0, color=style.COLOURS["dense"], linewidth=0.9, label="_dense")
    for name in style.ordered(best):
        reference = same_variant("dense", name, list(best))
        if reference is None or best[name].empty or best[reference].empty:
            continue
        flops, dense = np.log(best[name]["flops"]), best[reference]
        distance = best[name]["loss"] - np.interp(flops, np.log(dense["flops"]), dense["loss"])
        distance = distance.rolling(SMOOTHED, center=True, min_periods=1).mean()
        late = best[name]["flops"] >= start
        axes.plot(best[name]["flops"][late], distance[late], color=colours[name], linewidth=0.9, label=name)
