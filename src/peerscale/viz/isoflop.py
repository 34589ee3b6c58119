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
    """One budget: a point a run with +-1 standard error, the parabolas over the sizes fitted, their minima.

    Sizes that a parabola leaves out are hollow.

    Args:
        axes: where to draw.
        runs: rows of one budget, with a column `name`; only finished runs are drawn.
        vertices: the budget's entry of each method's isoFLOP fit, as in `fits.json`.
        x: column of the model size.
        marker, colours: of the points, and by method name.
    """
    runs = runs[usable(runs)]
    axes.set(xscale="log", yscale="log")
    for name in style.ordered(runs["name"]):
        rows = runs[runs["name"] == name].sort_values(x)
        color, vertex = colours[name], vertices.get(name)
        fitted = rows[x].isin(vertex["sizes"]) if vertex else rows[x].notna()
        _points(axes, rows[fitted], x, fmt=marker, color=color, markeredgecolor="white", label=name)
        if not fitted.all():
            hollow = {"markerfacecolor": "white", "markeredgecolor": color, "label": f"_left out {name}"}
            _points(axes, rows[~fitted], x, fmt=marker, color=color, **hollow)
        if vertex and None not in vertex["coefficients"]:
            sizes = np.geomspace(vertex["sizes"][0], vertex["sizes"][-1], 200)
            curve = np.polynomial.polynomial.polyval(np.log10(sizes), vertex["coefficients"])
            axes.plot(sizes, np.exp(curve), color=color, label=f"_fit {name}")
    if len(runs):
        _limits(axes, runs[x])
    for name in style.ordered(runs["name"]):
        vertex = vertices.get(name)
        if vertex is not None and vertex["x"] is not None:
            flagged, lowest = vertex["status"] != VertexStatus.OK, float(np.exp(vertex["loss"]))
            style.star(axes, vertex["x"], lowest, colours[name], f"_minimum {name}", hollow=flagged)


def _points(axes: Axes, rows: pd.DataFrame, x: str, **style: Any) -> None:
    loss, error = np.asarray(rows["val_loss"], float), np.nan_to_num(np.asarray(rows["val_loss_se"], float))
    perplexity = np.exp(loss)
    bars = [perplexity - np.exp(loss - error), np.exp(loss + error) - perplexity]
    axes.errorbar(np.asarray(rows[x], float), perplexity, bars, elinewidth=0.7, markeredgewidth=0.5, **style)


def isoflop_figure(runs: pd.DataFrame, fits: Mapping[str, Mapping[str, Any]], *, x: str, note: str = "") -> Figure:
    """A panel per budget with finished cells.

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
    budgets = sorted((runs if drawn.empty else drawn)["budget"].unique())
    names = style.ordered(drawn["name"])
    colours, markers = style.colours(names), style.markers(budgets)
    with style.applied():
        figure, panels = style.panels(len(budgets))
        for axes, budget in zip(panels, budgets, strict=True):
            at_budget = {name: vertex for (name, b), vertex in vertices.items() if b == budget}
            isoflop_panel(axes, runs[runs["budget"] == budget], at_budget, x=x, marker=markers[budget], colours=colours)
            axes.set(title=style.budget_title(budget), xlabel=X_LABELS[x])
        panels[0].set_ylabel("validation perplexity")
        style.method_legend(figure, names)
        flagged = any(vertex["status"] != VertexStatus.OK for vertex in vertices.values())
        stars = "stars: minima of the fitted parabolas" + (", hollow where flagged" if flagged else "")
        left_out = any("_left out" in str(drawn.get_label()) for axes in panels for drawn in axes.containers)
        hollow = "hollow points: too far above the lowest loss to be fitted" if left_out else ""
        style.caption(figure, note, f"bars: ±1 standard error; {stars}", hollow, missing_note(runs))
    return figure


def missing_note(runs: pd.DataFrame) -> str:
    """How many cells of the table a figure cannot show, by status; empty if none."""
    counts = runs.loc[~usable(runs), "status"].value_counts().sort_index()
    named = ", ".join(f"{n} {status}" for status, n in counts.items())
    return f"cells without a result: {named}" if named else ""


def _limits(axes: Axes, sizes: pd.Series) -> None:
    """Limits and ticks from what is drawn so far: a flagged minimum far off must not squeeze the points."""
    margin = max((sizes.max() / sizes.min()) ** 0.07, 1.15)
    axes.set_xlim(sizes.min() / margin, sizes.max() * margin)
    axes.margins(y=0.08)
    heights = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.lines])
    axes.set_ylim(axes.get_ylim() if np.ptp(heights) > 0 else (heights[0] / 1.1, heights[0] * 1.1))
    style.log_axis(axes.xaxis, *axes.get_xlim())
    style.log_axis(axes.yaxis, *axes.get_ylim())
