"""Training loss against the compute spent."""

import textwrap
from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from peerscale.figures import style
from peerscale.figures.isoflop import missing_note
from peerscale.stats.curves_of_runs import method_names, same_variant, usable

SKIPPED_SHARE = 0.08
"""Share of the budget before which a curve is not drawn: the first steps are uninformative but would set the scale."""

SMOOTHED = 5
"""Points of a curve over which a distance to dense is averaged, since the training loss of single batches scatters."""

CAPTION_WIDTH = 135
"""Letters in a line of the caption."""


def curves_figure(curves: pd.DataFrame, runs: pd.DataFrame, *, note: str = "") -> Figure:
    """One column per budget: above, each method's run with the lowest validation loss; below, its distance to dense's.

    `curves` and `runs` are the study's tables; runs without a curve are left out. There is no lower row without dense.
    """
    runs = runs.assign(name=method_names(runs))
    drawn = runs[usable(runs)]
    budgets = sorted((runs if drawn.empty else drawn)["budget"].unique())
    names = style.ordered(drawn["name"])
    colours = style.colours(names)
    rows = 1 + (len(names) > 1 and any(same_variant("dense", name, names) for name in names))
    with style.applied():
        figure = Figure(figsize=(style.TEXT_WIDTH, 2.2 * rows + 0.5), layout="constrained")
        panels = figure.subplots(rows, len(budgets), sharex="col", sharey="row", squeeze=False)
        sizes: list[str] = []
        for column, budget in zip(panels.T, budgets, strict=True):
            finished = drawn[drawn["budget"] == budget]
            lowest = finished.loc[finished.groupby("name")["val_loss"].idxmin()].set_index("name")
            best = {name: curves[curves["cell"] == lowest["cell"][name]] for name in style.ordered(lowest.index)}
            start = SKIPPED_SHARE * budget
            sizes += sizes_note(budget, {name: lowest["size"][name] for name in best})
            for name in best:
                late = best[name][best[name]["flops"] >= start]
                column[0].plot(late["flops"], late["loss"], color=colours[name], linewidth=0.9, label=name)
            if rows > 1:
                draw_distances(column[1], best, colours, start)
            limits = (0.9 * start, 1.1 * budget)
            column[0].set(xscale="log", xlim=limits, title=style.budget_title(budget))
            column[-1].set_xlabel("FLOPs spent")
            style.decade_axis(column[-1].xaxis)
        panels[0, 0].set_ylabel("training loss (nats per token)")
        if rows > 1:
            panels[1, 0].set_ylabel("loss minus dense's (nats per token)")
        style.method_legend(figure, names)
        figure.set_figheight(figure.get_figheight() + 0.12 * len(sizes))
        which = "each method's run of lowest validation loss; below, its loss minus dense's at equal FLOPs spent"
        which = which if rows > 1 else which.partition(";")[0]
        read = "models of different sizes have read different amounts of text at equal FLOPs"
        style.caption(figure, note, which, read * (drawn["size"].nunique() > 1), *sizes, missing_note(runs))
    return figure


def sizes_note(budget: float, sizes: Mapping[str, str]) -> list[str]:
    """The size of each method's run, as lines of the caption."""
    of_size: dict[str, list[str]] = {}
    for name, size in sizes.items():
        of_size.setdefault(style.size_label(size), []).append(style.label(name))
    told = "; ".join(f"{size} for {', '.join(names)}" for size, names in of_size.items())
    return textwrap.wrap(f"{style.budget_title(budget)}: {told}", CAPTION_WIDTH) if told else []


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
