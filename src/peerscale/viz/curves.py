"""Training loss against compute spent."""

from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from peerscale.runs.study import method_names, usable
from peerscale.viz import style
from peerscale.viz.isoflop import missing_note

SKIPPED_SHARE = 0.08
"""Share of the budget before which a curve is not drawn: the first steps say nothing and set the scale."""


def curves_panel(axes: Axes, curves: pd.DataFrame, runs: pd.DataFrame, *, colours: Mapping[str, str]) -> None:
    """One budget: a line a run, each method's best run in full and the others pale.

    Args:
        axes: where to draw.
        curves: cell, flops, loss; rows of any cells.
        runs: rows of one budget, with a column `name`; runs without a curve are left out.
        colours: by method name.
    """
    finished = runs[usable(runs)]
    best = set(finished.loc[finished.groupby("name")["val_loss"].idxmin(), "cell"])
    for cell, name, budget in zip(finished["cell"], finished["name"], finished["budget"], strict=True):
        rows = curves[(curves["cell"] == cell) & (curves["flops"] >= SKIPPED_SHARE * budget)]
        alpha, width, order = (1.0, 1.3, 3) if cell in best else (0.25, 0.6, 2)
        axes.plot(
            rows["flops"], rows["loss"], color=colours[name], label=cell, alpha=alpha, linewidth=width, zorder=order
        )
    axes.set_xscale("log")
    style.flops_axis(axes.xaxis)


def curves_figure(curves: pd.DataFrame, runs: pd.DataFrame, *, note: str = "") -> Figure:
    """A panel per budget; `curves` and `runs` are the study's tables."""
    runs = runs.assign(name=method_names(runs))
    budgets = sorted(runs["budget"].unique())
    names = style.ordered(runs.loc[usable(runs), "name"])
    colours = style.colours(names)
    with style.applied():
        figure, panels = style.panels(len(budgets))
        for axes, budget in zip(panels, budgets, strict=True):
            curves_panel(axes, curves, runs[runs["budget"] == budget], colours=colours)
            axes.set_title(style.budget_title(budget))
            axes.set_xlabel("training FLOPs spent")
        panels[0].set_ylabel("training loss (nats per token)")
        style.legend(figure, style.method_handles(names, colours))
        bold = "bold: each method's run of lowest validation loss; pale: its other sizes"
        style.caption(figure, note, bold, missing_note(runs))
    return figure
