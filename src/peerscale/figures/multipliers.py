"""Compute multipliers: the baseline's compute over a method's for the same loss, by budget."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from peerscale.figures import style
from peerscale.figures.published import DENSE, paper_values
from peerscale.stats.curve import Curve
from peerscale.stats.multiplier import compute_multipliers
from peerscale.stats.multipliers_at_sizes import multipliers_at_single_sizes

COLUMNS = ("method", "reference", "budget", "multiplier", "low", "high")
"""What `fits.json` tells of each multiplier."""

APART = 1.06
"""Factor between the x values of neighbouring methods."""


@style.applied()
def multipliers_figure(fits: Mapping[str, Any], published: pd.DataFrame, done: pd.DataFrame) -> Figure | None:
    """The multipliers of all methods with their intervals, and on the right the paper's; None without two budgets.

    A point is hollow if it comes from a flagged minimum or, for a method without minima, from single sizes.

    Args:
        fits: the study's fits, from `read_fits`.
        published: the paper's numbers.
        done: the study's finished runs, with their `curve`.
    """
    flagged = style.flagged_minima(fits)
    found = pd.DataFrame([*fits["multipliers"], *multipliers_at_single_sizes(done, fits)], columns=COLUMNS)
    if found["budget"].nunique() < 2:
        return None
    hollow = [style.compares_flagged(flagged, one["budget"], one) for one in fits["multipliers"]]
    found["hollow"] = [*hollow, *[True] * (len(found) - len(hollow))]
    found = found.rename(columns={"method": "series", "budget": "x", "multiplier": "y"})
    of_study = style.looks([*found["series"], *done["curve"]])
    looks = {curve: look for curve, look in of_study.items() if curve in {*found["series"]}}
    paper = paper_multipliers(published, {curve.method for curve in looks}) if fits["baseline"] == DENSE else {}
    figure = Figure((style.TEXT_WIDTH, 3.0), layout="constrained")
    panels = figure.subplots(1, 1 + bool(paper), sharey=True, squeeze=False, width_ratios=[4, 1][: 1 + bool(paper)])[0]
    start = fits.get("trend_from", 0.0)
    unjoined = {c: style.changed(look, linestyle="none", label=f"{c} apart") for c, look in looks.items()}
    style.points_panel(panels[0], found[found["x"] < start], unjoined, apart=APART)
    style.points_panel(panels[0], found[found["x"] >= start], looks, apart=APART)
    style.decade_axis(panels[0].xaxis, found["x"] if found["x"].nunique() < 6 else ())
    if paper:
        theirs = pd.DataFrame([
            {"series": Curve(method), "x": budget, "y": value}
            for method, values in paper.items() for budget, value in values.items()
        ])  # fmt: skip
        style.points_panel(panels[1], theirs, {curve: look for curve, look in looks.items() if not curve.settings})
        panels[1].set(title="the paper", xlim=(4e18, 3e19))
        style.decade_axis(panels[1].xaxis, theirs["x"])
    for axes in panels:
        axes.axhline(1, color=style.GREY, linewidth=0.9, label="_baseline")
        axes.set(xlabel="training FLOPs", yscale="log")
    panels[0].set_ylabel(f"compute multiplier over {style.label(Curve(fits['baseline']))}")
    style.log_axis(panels[0].yaxis, *panels[0].get_ylim())
    style.curve_legend(figure, looks)
    apart = f"lines start at {style.budget_title(start)}, as the trend does"
    style.caption(figure, apart if (found["x"] < start).any() else "")
    style.caption(figure, style.INTERVALS)
    few = f"without a minimum, compared with {style.label(Curve(fits['baseline']))} models of equal cost"
    causes = ["from a flagged minimum"] * any(hollow) + [few] * (len(found) > len(hollow))
    style.caption(figure, "hollow: " + ", or ".join(causes) if causes else "")
    return figure


def paper_multipliers(published: pd.DataFrame, methods: Iterable[str]) -> dict[str, dict[float, float]]:
    """The paper's multipliers by method and budget, computed from the perplexities of its Table 1 in the same way."""
    dense, found = paper_values(published, "table 1", DENSE, "ppl_c4"), {}
    budgets = np.array([*dense])
    for method in methods:
        values = paper_values(published, "table 1", method, "ppl_c4")
        if values.keys() == dense.keys():
            reference, own = ((budgets, np.log([*one.values()])) for one in (dense, values))
            found[method] = dict(zip(budgets.tolist(), compute_multipliers(reference, own).tolist(), strict=True))
    return found
