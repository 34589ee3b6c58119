"""Differences of loss at the compute optimum, with intervals."""

from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from peerscale.viz import style

SPREAD = 0.8
"""Height that the budgets of one method share, in rows."""


def differences_panel(
    axes: Axes, differences: pd.DataFrame, *, colours: Mapping[str, str], markers: Mapping[float, str]
) -> None:
    """A row a method, in it a point with its interval per budget; hollow where a minimum is flagged.

    Args:
        axes: where to draw.
        differences: method, budget, difference, low, high (nats per token), flagged; one reference.
        colours: by method name.
        markers: by budget.
    """
    names = style.ordered(differences["method"])
    budgets = sorted(markers)
    middle = (len(budgets) - 1) / 2
    shift = {budget: SPREAD * (i - middle) / len(budgets) for i, budget in enumerate(budgets)}
    axes.axvline(0, color=style.COLOURS["dense"], linewidth=0.9)
    for row in differences.to_dict("records"):
        if pd.isna(row["difference"]):
            continue
        height = names.index(row["method"]) + shift[row["budget"]]
        color = colours[row["method"]]
        axes.plot([row["low"], row["high"]], [height, height], color=color, label=f"_interval {row['method']}")
        axes.plot(
            [row["difference"]], [height], marker=markers[row["budget"]], color=color, markersize=5, linestyle="none",
            markerfacecolor="white" if row["flagged"] else color, label=row["method"],
        )  # fmt: skip
    axes.set_yticks(range(len(names)), [style.label(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")


def differences_figure(differences: pd.DataFrame, *, reference: str = "dense", note: str = "") -> Figure:
    """All methods against `reference`; `differences` is the study's table of them."""
    shown = differences[differences["reference"] == reference]
    names = style.ordered(shown["method"])
    markers = style.markers(shown["budget"])
    with style.applied():
        figure, (axes,) = style.panels(1, height=0.55 + 0.36 * len(names))
        differences_panel(axes, shown, colours=style.colours(names), markers=markers)
        axes.set_xlabel(
            f"loss at the compute optimum minus {style.label(reference)}'s (nats per token; left is better)"
        )
        grey = style.COLOURS["dense"]
        style.legend(
            figure,
            [
                Line2D([], [], marker=marker, linestyle="none", color=grey, label=style.budget_title(budget))
                for budget, marker in markers.items()
            ],
        )
        covers = "95 % intervals: sampling of validation sequences, not seeds nor the choice of learning rate"
        hollow = "hollow: one of the two fitted minima is flagged" if shown["flagged"].any() else ""
        style.caption(figure, note, covers, hollow)
    return figure
