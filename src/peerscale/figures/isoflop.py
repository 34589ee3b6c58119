"""Perplexity against model size at equal training compute (paper, figure 1)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from peerscale.figures import style
from peerscale.stats.curve import Curve, at_size, by_budget, by_curve, finished
from peerscale.stats.optima import OptimumStatus

X_LABELS = {
    "params_total": "parameters, total",
    "params_active": "parameters, active per token",
    "params_non_embedding": "parameters, without embedding",
    "flops_per_token": "training FLOPs per token",
}

SMALL_PRINT = {
    "_minimum": "star: fitted minimum, hollow if flagged",
    "_hollow": "hollow points: in no fit",
}
"""Explanations of the lines whose labels begin so."""

CROWDED = 5
"""Curves in a panel above which all marks are finer."""


@style.applied()
def isoflop_figure(runs: pd.DataFrame, fits: Mapping[str, Any], *, x: str) -> Figure:
    """One panel per budget with finished cells.

    Args:
        runs: the study's table.
        fits: the study's fits, from `read_fits`.
        x: one of `X_LABELS`.
    """
    drawn = finished(runs)
    looks, of_budget = style.looks(drawn["curve"]), by_budget(drawn)
    figure, panels = style.panels(len(of_budget))
    for axes, (budget, rows) in zip(panels, of_budget.items(), strict=True):
        isoflop_panel(axes, rows, optima(fits).get(budget, {}), x=x, looks=looks)
        axes.set(title=style.budget_title(budget), xlabel=X_LABELS[x])
    style.label_left(panels, "validation perplexity")
    style.curve_legend(figure, looks)
    lines = [line for axes in panels for line in axes.lines if np.size(line.get_xdata())]
    kinds = {str(line.get_label()).partition(" ")[0] for line in lines}
    style.caption(figure, "; ".join(text for kind, text in SMALL_PRINT.items() if kind in kinds))
    return figure


def isoflop_panel(
    axes: Axes,
    runs: pd.DataFrame,
    fits: Mapping[Curve, Mapping[str, Any]],
    *,
    x: str,
    looks: Mapping[Curve, style.Look],
) -> None:
    """One budget: a point per run, the fitted curves and, below the points, their minima.

    Points of a method with too few sizes for a fit are hollow.

    Args:
        axes: where to draw.
        runs: the finished runs of one budget, with their `curve`.
        fits: the budget's `methods` in `fits.json`, by curve.
        x: column of the model size.
        looks: by curve.
    """
    of_curve = by_curve(runs)
    drawn = [(curve, of_curve[curve].sort_values(x), fits.get(curve)) for curve in style.ordered(of_curve)]
    axes.set(xscale="log", yscale="log")
    fine = {"linewidth": 0.7, "markersize": 4} if len(drawn) > CROWDED else {}
    looks = {curve: style.changed(looks[curve], **fine) for curve in of_curve}
    for curve, rows, fitted in drawn:
        _points(axes, rows, x, looks[curve], str(curve), hollow=not fitted)
        if fitted and None not in fitted["coefficients"]:
            sizes, losses = fitted_curve(fitted, 200)
            line = style.changed(looks[curve], marker="", label=f"_fit {curve}")
            axes.plot(at_size(rows[x], rows, sizes), np.exp(losses), **line)
    _limits(axes, runs[x])
    for curve, rows, fitted in drawn:
        if fitted and fitted["loss"] is not None:
            at, colour = float(at_size(rows[x], rows, fitted["x"])), looks[curve]["color"]
            flagged = fitted["status"] != OptimumStatus.OK
            style.star(axes, at, float(np.exp(fitted["loss"])), colour, f"_minimum {curve}", hollow=flagged)


def optima(fits: Mapping[str, Any]) -> dict[float, dict[Curve, Any]]:
    """The entry of each curve in `fits.json`, by budget and curve."""
    return {entry["budget"]: {m["name"]: m for m in entry["methods"]} for entry in fits["budgets"]}


def fitted_curve(fitted: Mapping[str, Any], points: int) -> tuple[np.ndarray, np.ndarray]:
    """FLOPs per token and losses along the parabola of a fit."""
    sizes = np.geomspace(fitted["sizes"][0], fitted["sizes"][-1], points)
    return sizes, np.polynomial.polynomial.polyval(np.log10(sizes), fitted["coefficients"])


def _points(axes: Axes, rows: pd.DataFrame, x: str, look: style.Look, label: str, *, hollow: bool = False) -> None:
    marks = style.changed(look, linestyle="none", label=label, hollow=hollow, zorder=6)  # above stars
    style.points(axes, rows[x], np.exp(rows["val_loss"].astype(float)), **marks)


def _limits(axes: Axes, sizes: pd.Series) -> None:
    """Set limits and ticks from what is drawn so far; a distant point or minimum must not squeeze the others."""
    margin = max((sizes.max() / sizes.min()) ** 0.07, 1.15)
    axes.set_xlim(sizes.min() / margin, sizes.max() * margin)
    axes.margins(y=0.08)
    heights = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.lines])
    axes.set_ylim(axes.get_ylim() if np.ptp(heights) > 0 else (heights[0] / 1.1, heights[0] * 1.1))
    style.log_axis(axes.xaxis, *axes.get_xlim())
    style.log_axis(axes.yaxis, *axes.get_ylim())
