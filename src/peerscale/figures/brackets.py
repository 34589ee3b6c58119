"""Rate brackets: loss against the factor of the learning rate."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from peerscale.figures import style
from peerscale.figures.markdown import number, section
from peerscale.plan.cell_names import budget_name
from peerscale.stats.curve import Curve

Fits = Mapping[str, Any]
"""A study's `fits.json`; the keys of brackets may be missing if the study has none."""


def brackets_section(fits: Fits) -> list[str]:
    """The table of all brackets; empty if there are none."""
    found = fits.get("rates", {}).get("brackets")
    if found is None:
        return []
    factors = sorted({factor for one in found["each"] for factor in one["losses"]}, key=float)
    rows = [
        {"budget": budget_name(one["budget"]), "size": style.size_label(one["size"]),
         "method": style.label(one["method"]), "seeds": str(one["seeds"]),
         **{f"loss at {factor}": number(one["losses"].get(factor), "{:.4f}") for factor in factors},
         "best factor": number(one["best"]) + " (beyond those tried)" * is_beyond(one),
         "gain ± s.e.": f"{number(one['gain'], '{:.4f}')} ± {number(one['se'], '{:.4f}')}"}
        for one in found["each"]
    ]  # fmt: skip
    curvature, error = (number(found[key], "{:.3f}") for key in ("curvature", "curvature_se"))
    return section(
        "Rate brackets",
        rows,
        f"One curvature, {curvature} ± {error} nats per (ln rate)²; losses scatter by "
        f"{number(found['scatter'], '{:.4f}')} nats about the parabolas ({found['df']} degrees of freedom).",
    )


def is_beyond(one: Mapping[str, Any]) -> bool:
    """Whether the best factor of a bracket is outside the factors that were tried."""
    tried = [float(factor) for factor in one["losses"]]
    return one["best"] is not None and not min(tried) <= one["best"] <= max(tried)


@style.applied()
def brackets_figure(fits: Fits, curves: Iterable[Curve] = ()) -> Figure | None:
    """One panel per budget and size: loss against the factor of the rate, with fitted parabolas; None without any.

    `curves` are all those of the study, so that they look alike in all its figures.
    """
    found = fits.get("rates", {}).get("brackets")
    if found is None:
        return None
    places = list(dict.fromkeys((one["budget"], one["size"]) for one in found["each"]))
    methods = {one["method"] for one in found["each"]}
    looks = {curve: look for curve, look in style.looks([*methods, *curves]).items() if curve in methods}
    figure, panels = style.panels(len(places), height=2.1)
    for axes, place in zip(panels, places, strict=True):
        here = [one for one in found["each"] if (one["budget"], one["size"]) == place]
        tried = sorted({float(factor) for one in here for factor in one["losses"]})
        x = np.geomspace(tried[0], tried[-1], 100)
        for one in here:
            look, name = looks[one["method"]], str(one["method"])
            factors, losses = [float(f) for f in one["losses"]], [*one["losses"].values()]
            style.points(axes, factors, losses, **style.changed(look, linestyle="none", label=name, zorder=6))
            if one["best"] is None:
                continue
            y = one["lowest"] + found["curvature"] * np.log(x / one["best"]) ** 2
            axes.plot(x, y, **style.changed(look, marker="", linewidth=0.9, label=f"_parabola {name}"))
            if not is_beyond(one):
                style.star(axes, one["best"], one["lowest"], look["color"], f"_best {name}")
        axes.set(title=f"{style.budget_title(place[0])}\n{style.size_label(place[1])}", xscale="log")
        axes.set_xlabel("factor of the learning rate")
        style.decade_axis(axes.xaxis, tried, "{:g}".format)
    style.label_left(panels, "loss (nats per token)")
    style.curve_legend(figure, looks)
    style.caption(figure, "star: lowest point of the fitted curve; factor 1: the rate in the other figures")
    style.caption(figure, "a method without points was trained at that rate alone")
    return figure
