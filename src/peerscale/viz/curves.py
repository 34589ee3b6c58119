"""Training loss against compute spent."""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from peerscale.runs.study import method_names, usable
from peerscale.viz import style
from peerscale.viz.isoflop import missing_note

SKIPPED_SHARE = 0.08
"""Share of the budget before which a curve is not drawn: the first steps say nothing and set the scale."""


def curves_figure(curves: pd.DataFrame, runs: pd.DataFrame, *, note: str = "") -> Figure:
    """A panel per budget with finished cells: a line a run, each method's best in full and the others pale.

    `curves` and `runs` are the study's tables; runs without a curve are left out.
    """
    runs = runs.assign(name=method_names(runs))
    drawn = runs[usable(runs)]
    budgets = sorted((runs if drawn.empty else drawn)["budget"].unique())
    names = style.ordered(drawn["name"])
    colours = style.colours(names)
    with style.applied():
        figure, panels = style.panels(len(budgets))
        for axes, budget in zip(panels, budgets, strict=True):
            finished = drawn[drawn["budget"] == budget]
            best = set(finished.loc[finished.groupby("name")["val_loss"].idxmin(), "cell"])
            for cell, name in zip(finished["cell"], finished["name"], strict=True):
                rows = curves[(curves["cell"] == cell) & (curves["flops"] >= SKIPPED_SHARE * budget)]
                alpha, width, order = (1.0, 1.3, 3) if cell in best else (0.25, 0.6, 2)
                look: dict[str, Any] = {"color": colours[name], "alpha": alpha, "linewidth": width, "zorder": order}
                axes.plot(rows["flops"], rows["loss"], label=cell, **look)
            axes.set(xscale="log", title=style.budget_title(budget), xlabel="training FLOPs spent")
            style.decade_axis(axes.xaxis)
        panels[0].set_ylabel("training loss (nats per token)")
        style.method_legend(figure, names)
        bold = "bold: each method's run of lowest validation loss; pale: its other sizes"
        style.caption(figure, note, bold, missing_note(runs))
    return figure
