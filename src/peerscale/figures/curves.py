"""The course of training, against the compute spent."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from peerscale.figures import style
from peerscale.figures.differences import to_baseline
from peerscale.stats.curve import Curve, by_budget, by_curve, finished

SKIPPED_SHARE = 0.15
"""Share of the budget before which a curve is not drawn: the first steps are uninformative but would set the scale."""

WINDOWS = 5
"""A distance is the mean over this part of a curve's points, as the training loss of single batches scatters."""

SMOOTHED = "lines: training loss of each method's best size, mean over a fifth of the run"

POINTS = (
    "points on the right: the table's difference of validation losses, hollow if at one size or from a flagged minimum"
)


@style.applied()
def curves_figure(training: pd.DataFrame, runs: pd.DataFrame, fits: Mapping[str, Any]) -> Figure:
    """One panel per budget: the training loss of each curve's best run, less that of the baseline's.

    Args:
        training, runs, fits: the study's; runs without training curves are left out.

    The point beside a line is the table's difference of validation losses, which is another quantity and is not joined
    to it. Without the baseline losses are drawn. Below the budget stand the sizes of the runs.
    """
    drawn, baseline, flagged = finished(runs), fits["baseline"], style.flagged_minima(fits)
    looks, differences = style.looks(drawn["curve"]), to_baseline(fits)
    compared = any(curve.counterpart(baseline, looks) for curve in looks)
    figure, panels = style.panels(drawn["budget"].nunique())
    pointed = False
    for axes, (budget, cells) in zip(panels, by_budget(drawn).items(), strict=True):
        best = {curve: rows.loc[rows["val_loss"].idxmin()] for curve, rows in by_curve(cells).items()}
        logged = {curve: training[training["cell"] == run["cell"]] for curve, run in best.items()}
        for curve in style.ordered(best):
            line, reference = logged[curve], curve.counterpart(baseline, best)
            if compared and reference:
                line = distances(line, logged[reference])
            elif compared:
                continue
            late = line[line["flops"] >= SKIPPED_SHARE * budget]
            look = style.changed(looks[curve], linewidth=0.9, marker="")
            axes.plot(late["flops"] / budget, late["loss"], **look, label=str(curve))
            end = differences.get((budget, "", curve)) or differences.get((budget, str(best[curve]["size"]), curve))
            if compared and end and end.get("value") is not None:
                face = "white" if end["size"] or style.compares_flagged(flagged, budget, end) else look["color"]
                point = style.changed(looks[curve], linestyle="none", markerfacecolor=face, clip_on=False)
                axes.plot([1.0], [end["value"]], **point, label=f"_difference {curve}")
                pointed = True
        title = f"{style.budget_title(budget)}\n{widths(str(run['size']) for run in best.values())}"
        axes.set(title=title, xlabel="share of the FLOPs spent", xlim=(0, 1))
        if compared:
            axes.axhline(0, color=style.GREY, linewidth=0.9, label="_baseline")
    named = f"loss minus {style.label(Curve(baseline))}'s" if compared else "loss"
    style.label_left(panels, f"training {named} (nats per token)")
    shown = {curve: look for curve, look in looks.items() if not compared or curve.method != baseline}
    style.curve_legend(figure, shown)
    style.caption(figure, SMOOTHED if compared else "")
    style.caption(figure, POINTS if pointed else "")
    return figure


def widths(sizes: Iterable[str]) -> str:
    """Sizes from the narrowest to the widest: `d_model 48 to 64`."""
    labels = {style.size_label(size).partition(" (")[0] for size in sizes}
    narrow, *wider = sorted(labels, key=lambda label: (len(label), label))
    return " to ".join([narrow, *(wide.removeprefix("d_model ") for wide in wider[-1:])])


def distances(logged: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """The FLOPs of a curve and its loss less another's at the same FLOPs (log-linear between points), smoothed."""
    if logged.empty or other.empty:
        return logged.iloc[:0]
    distance = logged["loss"] - np.interp(np.log(logged["flops"]), np.log(other["flops"]), other["loss"])
    window = max(len(logged) // WINDOWS, 1)
    return logged.assign(loss=distance.rolling(window, center=True).mean()).dropna(subset="loss")
