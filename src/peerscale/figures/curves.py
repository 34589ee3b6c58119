"""Training loss against the compute spent."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from peerscale.figures import style
from peerscale.stats.curve import Curve, by_budget, by_curve, finished

SKIPPED_SHARE = 0.08
"""Share of the budget before which a curve is not drawn: the first steps are uninformative but would set the scale."""

SMOOTHED = 5
"""Points of a curve over which a distance is averaged, since the training loss of single batches scatters."""


@style.applied()
def curves_figure(training: pd.DataFrame, runs: pd.DataFrame, baseline: str) -> Figure:
    """One column per budget: above, each curve's run with the lowest validation loss; below, its distance to the
    baseline's.

    `training` and `runs` are the study's tables; runs without training curves are left out. There is no lower row
    without the baseline.
    """
    drawn = finished(runs)
    of_budget, every = by_budget(drawn), style.ordered(drawn["curve"])
    colours = style.colours(every)
    n_rows = 1 + any(curve.counterpart(baseline, every) is not None for curve in every)
    figure = Figure(figsize=(style.TEXT_WIDTH, 2.2 * n_rows + 0.5), layout="constrained")
    panels = figure.subplots(n_rows, len(of_budget), sharex="col", sharey="row", squeeze=False)
    for column, (budget, cells) in zip(panels.T, of_budget.items(), strict=True):
        lowest = {curve: rows.loc[rows["val_loss"].idxmin(), "cell"] for curve, rows in by_curve(cells).items()}
        best = {curve: training[training["cell"] == lowest[curve]] for curve in style.ordered(lowest)}
        start = SKIPPED_SHARE * budget
        for curve, logged in best.items():
            late = logged[logged["flops"] >= start]
            column[0].plot(late["flops"], late["loss"], color=colours[curve], linewidth=0.9, label=str(curve))
        if n_rows > 1:
            draw_distances(column[1], best, colours, start, baseline)
        column[0].set(xscale="log", xlim=(0.9 * start, 1.1 * budget), title=style.budget_title(budget))
        column[-1].set_xlabel("FLOPs spent")
        style.decade_axis(column[-1].xaxis)
    panels[0, 0].set_ylabel("training loss (nats per token)")
    if n_rows > 1:
        panels[1, 0].set_ylabel(f"loss minus {style.label(Curve(baseline))}'s (nats per token)")
    style.method_legend(figure, every)
    return figure


def draw_distances(
    axes: Axes, best: Mapping[Curve, pd.DataFrame], colours: Mapping[Curve, str], start: float, baseline: str
) -> None:
    """Draw each loss minus the baseline's at the same FLOPs (log-linear between points), from `start` FLOPs on."""
    axes.axhline(0, color=style.GREY, linewidth=0.9, label="_baseline")
    for curve, logged in best.items():
        reference = curve.counterpart(baseline, best)
        if reference is None or logged.empty or best[reference].empty:
            continue
        other = best[reference]
        distance = logged["loss"] - np.interp(np.log(logged["flops"]), np.log(other["flops"]), other["loss"])
        distance = distance.rolling(SMOOTHED, center=True, min_periods=1).mean()
        late = logged["flops"] >= start
        axes.plot(logged["flops"][late], distance[late], color=colours[curve], linewidth=0.9, label=str(curve))
