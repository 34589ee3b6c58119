"""Differences of loss at the compute optimum, with intervals."""

from collections.abc import Iterable, Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from peerscale.viz import style

SPREAD = 0.8
"""Height that the budgets of one method share, in rows."""


def differences_figure(
    fits: Mapping[str, Any], *, reference: str = "dense", methods: Iterable[str] = (), note: str = ""
) -> Figure | None:
    """All methods against `reference`: a row a method, in it a point with its interval per budget; None without any.

    `fits` is the study's `fits.json`; `methods` are those of the study, so that each has the colour of its other
    figures.
    """
    shown = [
        {**found, "budget": entry["budget"]}
        for entry in fits["budgets"]
        for found in entry["differences"]
        if found["reference"].partition(" ")[0] == reference and found.get("value") is not None
    ]
    if not shown:
        return None
    names = style.ordered(found["method"] for found in shown)
    markers = style.markers(found["budget"] for found in shown)
    colours, grey = style.colours([*methods, *names]), style.COLOURS["dense"]
    shift = {budget: SPREAD * ((i + 0.5) / len(markers) - 0.5) for i, budget in enumerate(markers)}
    with style.applied():
        figure, (axes,) = style.panels(1, height=0.55 + 0.36 * len(names))
        axes.axvline(0, color=grey, linewidth=0.9)
        for row in shown:
            height, color = names.index(row["method"]) + shift[row["budget"]], colours[row["method"]]
            axes.plot([row["low"], row["high"]], [height, height], color=color, label=f"_interval {row['method']}")
            axes.plot(
                [row["value"]], [height], marker=markers[row["budget"]], color=color, markersize=5,
                linestyle="none", label=row["method"],
            )  # fmt: skip
        axes.set_yticks(range(len(names)), [style.label(name) for name in names])
        axes.grid(visible=False, axis="y")
        minus = f"minus {style.label(reference)}'s (nats per token; left is better)"
        axes.set(ylim=(len(names) - 0.4, -0.6), xlabel=f"loss at the compute optimum {minus}")
        look: dict[str, Any] = {"linestyle": "none", "color": grey}
        style.legend(
            figure, [Line2D([], [], marker=m, label=style.budget_title(b), **look) for b, m in markers.items()]
        )
        style.caption(
            figure,
            note,
            "bars: 95 % interval from misfit of sizes, seeds and validation sequences, not from learning rates",
        )
    return figure
