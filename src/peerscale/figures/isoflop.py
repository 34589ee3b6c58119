"""Perplexity against model size at equal training compute (paper, figure 1)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from peerscale.figures import style
from peerscale.stats.curves_of_runs import at_size, method_names, usable
from peerscale.stats.optima import OptimumStatus

X_LABELS = {
    "params_total": "parameters, total",
    "params_active": "parameters, active per token",
    "params_non_embedding": "parameters, without embedding",
    "flops_per_token": "training FLOPs per token",
}

FITTED = "flops_per_token"
"""The size that the fits of `fits.json` use; other sizes are interpolated between the trained models."""


@style.applied()
def isoflop_figure(runs: pd.DataFrame, fits: Mapping[str, Any], *, x: str) -> Figure:
    """One panel per budget with finished cells.

    Args:
        runs: the study's table.
        fits: the study's `fits.json`.
        x: one of `X_LABELS`.
    """
    runs = runs.assign(name=method_names(runs))
    drawn = runs[usable(runs)]
    budgets = sorted((runs if drawn.empty else drawn)["budget"].unique())
    names = style.ordered(drawn["name"])
    colours, markers = style.colours(names), style.method_markers(names)
    figure, panels = style.panels(len(budgets))
    for axes, budget in zip(panels, budgets, strict=True):
        fitted = by_budget(fits).get(budget, {})
        isoflop_panel(axes, runs[runs["budget"] == budget], fitted, x=x, markers=markers, colours=colours)
        axes.set(title=style.budget_title(budget), xlabel=X_LABELS[x])
    style.label_left(panels, "validation perplexity")
    style.method_legend(figure, names, markers)
    return figure


def isoflop_panel(
    axes: Axes,
    runs: pd.DataFrame,
    methods: Mapping[str, Mapping[str, Any]],
    *,
    x: str,
    markers: Mapping[str, str],
    colours: Mapping[str, str],
) -> None:
    """One budget: a point per run with +-1 standard error, the fitted curves and, below the points, their minima.

    Sizes outside the fitted window are hollow; those far above the fitted ones are triangles at the upper edge.

    Args:
        axes: where to draw.
        runs: rows of one budget, with a column `name`; only finished runs are drawn.
        methods: the budget's `methods` in `fits.json`, by name.
        x: column of the model size.
        markers: of the points, by method name.
        colours: by method name.
    """
    runs = runs[usable(runs)]
    of_methods = [
        (name, runs[runs["name"] == name].sort_values(x), methods.get(name)) for name in style.ordered(runs["name"])
    ]
    axes.set(xscale="log", yscale="log")
    for name, rows, fitted in of_methods:
        _points(axes, rows[in_fit(rows, fitted)], x, color=colours[name], marker=markers[name], label=name)
        if fitted and None not in fitted["coefficients"]:
            sizes, losses = fitted_curve(fitted, 200)
            axes.plot(at_size(rows[x], rows, sizes), np.exp(losses), color=colours[name], label=f"_fit {name}")
    if len(runs):
        _limits(axes, runs[x])
    top, triangles = axes.get_ylim()[1], np.empty(0)
    for name, rows, fitted in of_methods:
        outside = rows[~in_fit(rows, fitted)]
        above = np.exp(outside["val_loss"]) > top
        if not above.all():
            look = {"color": colours[name], "marker": markers[name], "label": f"_left out {name}"}
            _points(axes, outside[~above], x, hollow=True, **look)
        if above.any():
            look = {"color": colours[name], "markerfacecolor": "white", "label": f"_left out {name}, above"}
            for place in np.unique(outside.loc[above, x].astype(float)):
                axes.plot(place, stacked(axes, triangles, place), "^", clip_on=False, **look)
                triangles = np.append(triangles, place)
        if fitted and fitted["loss"] is not None:
            at, flagged = float(at_size(rows[x], rows, fitted["x"])), fitted["status"] != OptimumStatus.OK
            style.star(axes, at, float(np.exp(fitted["loss"])), colours[name], f"_minimum {name}", hollow=flagged)


def stacked(axes: Axes, others: np.ndarray, x: float) -> float:
    """The height of a triangle at `x`: the upper edge of the panel, or lower if it would cover one at `others`."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    near = np.abs(np.log(others / x)) < 0.04 * np.log(right / left)
    return float(high * (low / high) ** (0.035 * near.sum()))


def by_budget(fits: Mapping[str, Any]) -> dict[float, dict[str, Any]]:
    """The entry of each curve in `fits.json`, by budget and name."""
    return {entry["budget"]: {m["name"]: m for m in entry["methods"]} for entry in fits["budgets"]}


def in_fit(rows: pd.DataFrame, fitted: Mapping[str, Any] | None) -> pd.Series:
    """Which of a method's rows have a size that its fit used; all of them if there is no fit."""
    return rows[FITTED].isin(fitted["sizes"] if fitted else rows[FITTED])


def fitted_curve(fitted: Mapping[str, Any], points: int) -> tuple[np.ndarray, np.ndarray]:
    """FLOPs per token and losses along the parabola of a fit."""
    sizes = np.geomspace(fitted["sizes"][0], fitted["sizes"][-1], points)
    return sizes, np.polynomial.polynomial.polyval(np.log10(sizes), fitted["coefficients"])


def status_counts(runs: pd.DataFrame) -> list[str]:
    """`2 failed`, `1 pending`, ..."""
    return [f"{n} {status}" for status, n in runs["status"].value_counts().sort_index().items()]


def _points(axes: Axes, rows: pd.DataFrame, x: str, **look: Any) -> None:
    loss, error = np.asarray(rows["val_loss"], float), np.nan_to_num(np.asarray(rows["val_loss_se"], float))
    bars = np.exp(loss - error), np.exp(loss + error)
    style.points(axes, rows[x], np.exp(loss), bars=bars, zorder=6, **look)  # above stars


def _limits(axes: Axes, sizes: pd.Series) -> None:
    """Set limits and ticks from what is drawn so far; a distant point or minimum must not squeeze the others."""
    margin = max((sizes.max() / sizes.min()) ** 0.07, 1.15)
    axes.set_xlim(sizes.min() / margin, sizes.max() * margin)
    axes.margins(y=0.08)
    heights = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.lines])
    axes.set_ylim(axes.get_ylim() if np.ptp(heights) > 0 else (heights[0] / 1.1, heights[0] * 1.1))
    style.log_axis(axes.xaxis, *axes.get_xlim())
    style.log_axis(axes.yaxis, *axes.get_ylim())
