"""Differences of loss at the compute optimum, with intervals."""

from collections.abc import Iterable
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from peerscale.viz import style

SPREAD = 0.8
"""Height that the budgets of one method share, in rows."""


def differences_figure(
    differences: pd.DataFrame, *, reference: str = "dense", methods: Iterable[str] = (), note: str = ""
) -> Figure:
    """All methods against `reference`: a row a method, in it a point with its interval per budget.

    `differences` has method, reference, budget, difference, low, high (nats per token) and flagged, drawn hollow.
    `methods` are those of the study, so that each has the colour of its other figures.
    """
    shown = differences[differences["reference"] == reference]
    names, markers = style.ordered(shown["method"]), style.markers(shown["budget"])
    colours, grey = style.colours([*methods, *names]), style.COLOURS["dense"]
    shift = {budget: SPREAD * ((i + 0.5) / len(markers) - 0.5) for i, budget in enumerate(markers)}
    with style.applied():
        figure, (axes,) = style.panels(1, height=0.55 + 0.36 * len(names))
        axes.axvline(0, color=grey, linewidth=0.9)
        for row in shown.dropna(subset="difference").to_dict("records"):
            height, color = names.index(row["method"]) + shift[row["budget"]], colours[row["method"]]
            axes.plot([row["low"], row["high"]], [height, height], color=color, label=f"_interval {row['method']}")
            axes.plot(
                [row["difference"]], [height], marker=markers[row["budget"]], color=color, markersize=5,
                linestyle="none", markerfacecolor="white" if row["flagged"] else color, label=row["method"],
            )  # fmt: skip
        axes.set_yticks(range(len(names)), [style.label(name) for name in names])
        axes.grid(visible=False, axis="y")
        minus = f"minus {style.label(reference)}'s (nats per token; left is better)"
        axes.set(ylim=(len(names) - 0.4, -0.6), xlabel=f"loss at the compute optimum {minus}")
        look: dict[str, Any] = {"linestyle": "none", "color": grey}
        style.legend(
            figure, [Line2D([], [], marker=m, label=style.budget_title(b), **look) for b, m in markers.items()]
        )
        covers = "95 % intervals: sampling of validation sequences, not seeds nor the choice of learning rate"
        hollow = "hollow: one of the two fitted minima is flagged" if shown["flagged"].any() else ""
        style.caption(figure, note, covers, hollow)
    return figure
