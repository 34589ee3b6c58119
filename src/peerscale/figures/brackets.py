"""Rate brackets: loss against the factor of the learning rate, and the part of a study's errors that they give."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from peerscale.figures import style
from peerscale.figures.isoflop import missing_note
from peerscale.figures.markdown import number, section
from peerscale.plan.cell_names import budget_name
from peerscale.stats.curves_of_runs import are_brackets

Fits = Mapping[str, Any]
"""A study's `fits.json`; the keys of brackets may be missing if the study has none."""


def hold_rates(fits: Fits) -> bool:
    """Whether a study's errors include the choice of learning rates, at least for some methods and budgets."""
    return any(error["se"] is not None for error in fits.get("rates", {}).get("errors", ()))


def what_intervals_hold(fits: Fits) -> str:
    """A sentence on whether the intervals of a study include the choice of learning rates."""
    if hold_rates(fits):
        return "They include the choice of learning rates wherever an error from it is known."
    return "They leave out the choice of learning rates."


def how_rates_count(fits: Fits) -> str:
    """The origin of the errors from learning rates, as a note for the table of errors by source."""
    if not hold_rates(fits):
        return "Learning rates: only in a study that brackets them."
    cost = fits["rates"]["cost"]
    return (
        "Learning rates: both methods' errors, added in quadrature. A bracketed method's is the root of the mean of "
        "gain² + s.e.² over its brackets at the budget: at a better rate its loss is lower by the gain at most. Losses "
        "and differences are not corrected for the gain. A method without a bracket at the budget "
        + ("adds nothing." if cost is None else f"has the {cost:g} nats that the study's file states.")
    )


def bars(fits: Fits) -> str:
    """The sources of error in the intervals of a figure, for its caption."""
    if hold_rates(fits):
        return "bars: 95 % interval from misfit of sizes, seeds, validation sequences and learning rates (table.md)"
    return "bars: 95 % interval from misfit of sizes, seeds and validation sequences, not from learning rates"


def brackets_section(runs: pd.DataFrame, fits: Fits) -> list[str]:
    """The table of all brackets; empty if there are none. `runs` is the whole table of the study."""
    found = fits.get("rates", {}).get("brackets")
    if found is None:
        return []
    factors = sorted({factor for one in found["each"] for factor in one["losses"]}, key=float)
    why = why_no_parabola(found)
    rows = [
        {"budget": budget_name(one["budget"]), "size": style.size_label(one["size"]),
         "method": style.label(one["method"]), "seeds": str(one["seeds"]),
         **{f"loss at {factor}": number(one["losses"].get(factor), "{:.4f}") for factor in factors},
         **({} if why else {
             "best factor": number(one["best"]) + " (beyond those tried)" * is_beyond(one),
             "gain ± s.e.": f"{number(one['gain'], '{:.4f}')} ± {number(one['se'], '{:.4f}')}"})}
        for one in found["each"]
    ]  # fmt: skip
    fit = (
        "All brackets are fitted together by parabolas in the logarithm of the rate: one curvature, "
        f"{number(found['curvature'], '{:.3f}')} ± {number(found['curvature_se'], '{:.3f}')} nats per (ln rate)²; "
        f"losses scatter by {number(found['scatter'], '{:.4f}')} nats about the parabolas ({found['df']} "
        "degrees of freedom). Gain: the fitted loss at factor 1 minus that at the best factor."
    )
    return section(
        "Rate brackets",
        rows,
        "Losses in nats per token at factors of the usual learning rate, means over seeds"
        f"{f'; {why}, so they give no error.' if why else f'. {fit}'} These cells are in no other table or figure.",
        *([f"- Brackets: {note}."] if (note := missing_note(runs[are_brackets(runs)])) else []),
        *(
            ["- So few losses leave no scatter about the parabolas: they give no error."]
            * (found["df"] == 0 and not why)
        ),
    )


def why_no_parabola(found: Mapping[str, Any]) -> str:
    """Why the brackets have no parabola that opens upwards; empty if they have one."""
    if any(one["best"] is not None for one in found["each"]):
        return ""
    few = all(len(one["losses"]) < 3 for one in found["each"])
    return "two rates give no parabola" if few else "they do not rise on both sides of a best rate"


def is_beyond(one: Mapping[str, Any]) -> bool:
    """Whether the best factor of a bracket is outside the factors that were tried."""
    tried = [float(factor) for factor in one["losses"]]
    return one["best"] is not None and not min(tried) <= one["best"] <= max(tried)


def brackets_figure(fits: Fits, *, note: str = "") -> Figure | None:
    """One panel per budget and size: loss against the factor of the rate, with fitted parabolas; None without any."""
    found = fits.get("rates", {}).get("brackets")
    if found is None:
        return None
    places = list(dict.fromkeys((one["budget"], one["size"]) for one in found["each"]))
    names = style.ordered(one["method"] for one in found["each"])
    colours = style.colours(names)
    with style.applied():
        figure, panels = style.panels(len(places), height=2.1)
        for axes, place in zip(panels, places, strict=True):
            here = [one for one in found["each"] if (one["budget"], one["size"]) == place]
            tried = sorted({float(factor) for one in here for factor in one["losses"]})
            x = np.geomspace(tried[0], tried[-1], 100)
            for one in here:
                colour, name = colours[one["method"]], one["method"]
                factors, losses = [float(f) for f in one["losses"]], [*one["losses"].values()]
                axes.plot(factors, losses, "o", color=colour, zorder=6, label=name)
                if one["best"] is None:
                    continue
                y = one["lowest"] + found["curvature"] * np.log(x / one["best"]) ** 2
                axes.plot(x, y, color=colour, linewidth=0.9, label=f"_parabola {name}")
                if not is_beyond(one):
                    style.star(axes, one["best"], one["lowest"], colour, f"_best {name}")
            axes.set(title=f"{style.budget_title(place[0])}\n{style.size_label(place[1])}", xscale="log")
            axes.set_xlabel("factor of the usual rate")
            style.decade_axis(axes.xaxis, tried, "{:g}".format)
        style.label_left(panels, "loss (nats per token)")
        style.method_legend(figure, names)
        drawn = "lines: parabolas in ln rate, one curvature for all; stars: their minima, where within the rates tried"
        if why := why_no_parabola(found):
            drawn = f"losses at factors of the usual rate; {why}"
        seeds = "points: means over seeds; " * any(one["seeds"] > 1 for one in found["each"])
        style.caption(figure, note, drawn, f"{seeds}at factor 1 the study's own cells")
    return figure
