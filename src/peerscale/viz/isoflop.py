"""Perplexity against model size at equal training compute (paper, figure 1)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from peerscale.laws.isoflop import VertexStatus
from peerscale.runs.study import method_names, usable
from peerscale.viz import style

X_LABELS = {
    "params_total": "parameters, total",
    "params_active": "parameters, active per token",
    "params_non_embedding": "parameters, without embedding",
    "flops_per_token": "training FLOPs per token",
}


def isoflop_panel(
    axes: Axes,
    runs: pd.DataFrame,
    vertices: Mapping[str, Mapping[str, Any]],
    *,
    x: str,
    marker: str,
    colours: Mapping[str, str],
) -> None:
    """One budget: a point a run with +-1 standard error, the fitted parabolas over the sampled range, their minima.

    Args:
        axes: where to draw.
        runs: rows of one budget, with a column `name`; only finished runs are drawn.
        vertices: the budget's entry of each method's isoFLOP fit, as in `fits.json`.
        x: column of the model size.
        marker: of the points.
        colours: by method name.
    """
    runs = runs[usable(runs)]
    axes.set_xscale("log")
    axes.set_yscale("log")
    for name in style.ordered(runs["name"]):
        rows = runs[runs["name"] == name].sort_values(x)
        vertex = vertices.get(name)
        _points(axes, rows, x=x, marker=marker, color=colours[name], name=name)
        if vertex is not None and None not in vertex["coefficients"]:
            sizes = np.geomspace(rows[x].min(), rows[x].max(), 200)
            curve = np.polynomial.polynomial.polyval(np.log10(sizes), vertex["coefficients"])
            axes.plot(sizes, np.exp(curve), color=colours[name], label=f"_fit {name}")
    if len(runs):
        _limits(axes, runs[x])
    for name in style.ordered(runs["name"]):
        if name in vertices:
            _star(axes, vertices[name], color=colours[name], name=name)


def isoflop_figure(runs: pd.DataFrame, fits: Mapping[str, Mapping[str, Any]], *, x: str, note: str = "") -> Figure:
    """A panel per budget.

    Args:
        runs: the study's table.
        fits: the study's `fits.json`; the fits over column `x` are drawn.
        x: one of `X_LABELS`.
        note: small print: data set, FLOP convention.
    """
    runs = runs.assign(name=method_names(runs))
    drawn = runs[usable(runs)]
    vertices = {
        (fit["method"], vertex["budget"]): vertex
        for fit in fits.values()
        if fit["law"] == "isoflop" and fit["x"] == x
        for vertex in fit["vertices"]
    }
    budgets = sorted(runs["budget"].unique())
    names = style.ordered(drawn["name"])
    colours, markers = style.colours(names), style.markers(budgets)
    with style.applied():
        figure, panels = style.panels(len(budgets))
        for axes, budget in zip(panels, budgets, strict=True):
            at_budget = {name: vertex for (name, b), vertex in vertices.items() if b == budget}
            isoflop_panel(axes, runs[runs["budget"] == budget], at_budget, x=x, marker=markers[budget], colours=colours)
            axes.set_title(style.budget_title(budget))
            axes.set_xlabel(X_LABELS[x])
        panels[0].set_ylabel("validation perplexity")
        style.legend(figure, style.method_handles(names, colours))
        flagged = any(vertex["status"] != VertexStatus.OK for vertex in vertices.values())
        stars = "stars: minima of the fitted parabolas" + (", hollow where flagged" if flagged else "")
        style.caption(figure, note, f"bars: ±1 standard error; {stars}", missing_note(runs))
    return figure


def missing_note(runs: pd.DataFrame) -> str:
    """How many cells of the table a figure cannot show, by status; empty if none."""
    counts = runs.loc[~usable(runs), "status"].value_counts().sort_index()
    return (
        "cells without a result: " + ", ".join(f"{n} {status}" for status, n in counts.items()) if len(counts) else ""
    )


def _points(axes: Axes, rows: pd.DataFrame, *, x: str, marker: str, color: str, name: str) -> None:
    loss, error = np.asarray(rows["val_loss"], float), np.nan_to_num(np.asarray(rows["val_loss_se"], float))
    perplexity = np.exp(loss)
    reach = np.stack([perplexity - np.exp(loss - error), np.exp(loss + error) - perplexity])
    axes.errorbar(
        np.asarray(rows[x], float), perplexity, yerr=reach, fmt=marker, color=color, elinewidth=0.7,
        markeredgewidth=0.5, markeredgecolor="white", label=name,
    )  # fmt: skip


def _limits(axes: Axes, sizes: pd.Series) -> None:
    """Limits and ticks from what is drawn so far: a flagged minimum far off must not squeeze the points."""
    margin = max((sizes.max() / sizes.min()) ** 0.07, 1.15)
    axes.set_xlim(sizes.min() / margin, sizes.max() * margin)
    axes.margins(y=0.08)
    heights = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.lines])
    if np.ptp(heights) > 0:
        axes.set_ylim(axes.get_ylim())
    else:
        axes.set_ylim(heights[0] / 1.1, heights[0] * 1.1)
    style.log_axis(axes.xaxis, *axes.get_xlim())
    style.log_axis(axes.yaxis, *axes.get_ylim())


def _star(axes: Axes, vertex: Mapping[str, Any], *, color: str, name: str) -> None:
    if vertex["x"] is None:
        return  # no minimum to mark
    flagged = vertex["status"] != VertexStatus.OK
    axes.plot(
        [vertex["x"]], [np.exp(vertex["loss"])], marker="*", markersize=10, color=color, linestyle="none", zorder=5,
        markerfacecolor="white" if flagged else color, markeredgecolor=color if flagged else "white",
        markeredgewidth=0.9 if flagged else 0.6, label=f"_minimum {name}",
    )  # fmt: skip
