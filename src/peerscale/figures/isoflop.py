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

FITTED = "flops_per_token"
"""The size that the fits of `fits.json` use; other sizes are interpolated between the trained models."""


@style.applied()
def isoflop_figure(runs: pd.DataFrame, fits: Mapping[str, Any], *, x: str) -> Figure:
    """One panel per budget with finished cells.

    Args:
        runs: the study's table.
        fits: the study's fits, from `read_fits`.
        x: one of `X_LABELS`.
    """
    drawn = finished(runs)
    curves, of_budget = style.ordered(drawn["curve"]), by_budget(drawn)
    colours, markers = style.colours(curves), style.method_markers(curves)
    figure, panels = style.panels(len(of_budget))
    for axes, (budget, rows) in zip(panels, of_budget.items(), strict=True):
        isoflop_panel(axes, rows, optima(fits).get(budget, {}), x=x, markers=markers, colours=colours)
        axes.set(title=style.budget_title(budget), xlabel=X_LABELS[x])
    style.label_left(panels, "validation perplexity")
    style.method_legend(figure, curves, markers)
    return figure


def isoflop_panel(
    axes: Axes,
    runs: pd.DataFrame,
    fits: Mapping[Curve, Mapping[str, Any]],
    *,
    x: str,
    markers: Mapping[Curve, str],
    colours: Mapping[Curve, str],
) -> None:
    """One budget: a point per run with +-1 standard error, the fitted curves and, below the points, their minima.

    Sizes outside the fitted window are hollow; those far above the fitted ones are triangles at the upper edge.

    Args:
        axes: where to draw.
        runs: the finished runs of one budget, with their `curve`.
        fits: the budget's `methods` in `fits.json`, by curve.
        x: column of the model size.
        markers: of the points, by curve.
        colours: by curve.
    """
    of_curve = by_curve(runs)
    of_curves = [(curve, of_curve[curve].sort_values(x)) for curve in style.ordered(of_curve)]
    axes.set(xscale="log", yscale="log")
    for curve, rows in of_curves:
        fitted, colour = fits.get(curve), colours[curve]
        _points(axes, rows[in_fit(rows, fitted)], x, color=colour, marker=markers[curve], label=str(curve))
        if fitted and None not in fitted["coefficients"]:
            sizes, losses = fitted_curve(fitted, 200)
            axes.plot(at_size(rows[x], rows, sizes), np.exp(losses), color=colour, label=f"_fit {curve}")
    _limits(axes, runs[x])
    top, triangles = axes.get_ylim()[1], np.empty(0)
    for curve, rows in of_curves:
        fitted, colour = fits.get(curve), colours[curve]
        outside = rows[~in_fit(rows, fitted)]
        above = np.exp(outside["val_loss"]) > top
        if not above.all():
            look = {"color": colour, "marker": markers[curve], "label": f"_left out {curve}"}
            _points(axes, outside[~above], x, hollow=True, **look)
        if above.any():
            look = {"color": colour, "markerfacecolor": "white", "label": f"_left out {curve}, above"}
            for place in np.unique(outside.loc[above, x].astype(float)):
                axes.plot(place, stacked(axes, triangles, place), "^", clip_on=False, **look)
                triangles = np.append(triangles, place)
        if fitted and fitted["loss"] is not None:
            at, flagged = float(at_size(rows[x], rows, fitted["x"])), fitted["status"] != OptimumStatus.OK
            style.star(axes, at, float(np.exp(fitted["loss"])), colour, f"_minimum {curve}", hollow=flagged)


def stacked(axes: Axes, others: np.ndarray, x: float) -> float:
    """The height of a triangle at `x`: the upper edge of the panel, or lower if it would cover one at `others`."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    near = np.abs(np.log(others / x)) < 0.04 * np.log(right / left)
    return float(high * (low / high) ** (0.035 * near.sum()))


def optima(fits: Mapping[str, Any]) -> dict[float, dict[Curve, Any]]:
    """The entry of each curve in `fits.json`, by budget and curve."""
    return {entry["budget"]: {m["name"]: m for m in entry["methods"]} for entry in fits["budgets"]}


def in_fit(rows: pd.DataFrame, fitted: Mapping[str, Any] | None) -> pd.Series:
    """Which of a method's rows have a size that its fit used; all of them if there is no fit."""
    return rows[FITTED].isin(fitted["sizes"] if fitted else rows[FITTED])


def fitted_curve(fitted: Mapping[str, Any], points: int) -> tuple[np.ndarray, np.ndarray]:
    """FLOPs per token and losses along the parabola of a fit."""
    sizes = np.geomspace(fitted["sizes"][0], fitted["sizes"][-1], points)
    return sizes, np.polynomial.polynomial.polyval(np.log10(sizes), fitted["coefficients"])


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
