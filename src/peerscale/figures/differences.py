"""Differences of loss to dense, at the compute optimum or at one size, with intervals."""

from collections.abc import Iterable, Mapping
from operator import itemgetter
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from peerscale.figures import style
from peerscale.figures.markdown import signed_interval
from peerscale.stats.curves_of_runs import is_dense, same_variant

Differences = dict[tuple[float, str, str], Mapping[str, Any]]
"""By budget, size (empty: at the optimum) and method."""


def to_dense(fits: Mapping[str, Any]) -> Differences:
    """The differences of each method to dense with the same settings, or to dense as configured."""
    return {
        (entry["budget"], found["size"], found["method"]): found
        for entry in fits["budgets"]
        for names in [{one[key] for one in entry["differences"] for key in ("method", "reference")}]
        for found in entry["differences"]
        if found["reference"] == same_variant("dense", found["method"], names)
    }


def against_dense(differences: Differences, budget: float, size: str, name: str) -> str:
    """One of the differences of `to_dense` as a table shows it; `reference` for a dense model that has none."""
    found = differences.get((budget, size, name))
    return "reference" if found is None and is_dense(name) else signed_interval(found)


@style.applied()
def differences_figure(fits: Mapping[str, Any], methods: Iterable[str] = ()) -> Figure | None:
    """All methods against dense: a row per method, with a point and its interval per budget or size; None without any.

    `fits` is the study's `fits.json`; `methods` are all methods of the study, so that colours are the same in all its
    figures. Points from a flagged minimum are hollow, and so are points at one size beside others at the optimum.
    """
    shown = {place: found for place, found in to_dense(fits).items() if found.get("value") is not None}
    reference = "dense's"
    if len({found["reference"] for found in shown.values()}) > 1:  # so a dense model has another zero than its settings
        shown = {place: found for place, found in shown.items() if not is_dense(place[2])}
        reference = "dense's with the same settings"
    if not shown:
        return None
    names = style.ordered(name for _, _, name in shown)
    fixed = all(size for _, size, _ in shown)
    groups = {place: (place[0], place[1] * fixed) for place in shown}  # of points with one marker
    markers = style.markers(groups.values())
    colours, flagged = style.colours([*methods, *names]), style.flagged_minima(fits)
    of_name = {name: sorted((place for place in shown if place[2] == name), key=itemgetter(0)) for name in names}
    apart = 0.8 / max(map(len, of_name.values()))  # of two points, in rows
    figure, (axes,) = style.panels(1, height=0.75 + 0.36 * len(names))
    axes.axvline(0, color=style.COLOURS["dense"], linewidth=0.9)
    for place, found in shown.items():
        budget, size, name = place
        height = names.index(name) + (of_name[name].index(place) - (len(of_name[name]) - 1) / 2) * apart
        hollow = not fixed if size else style.compares_flagged(flagged, budget, found)
        look = {"color": colours[name], "markerfacecolor": "white" if hollow else colours[name], "markersize": 5}
        axes.plot([found["low"], found["high"]], [height, height], color=colours[name], label=f"_interval {name}")
        axes.plot([found["value"]], [height], markers[groups[place]], **look, label=name)
    axes.set_yticks(range(len(names)), [style.label(name) for name in names])
    axes.grid(visible=False, axis="y")
    sizes = list(dict.fromkeys(style.size_label(size) for _, size, _ in shown))
    axes.set_title(" and ".join(sizes) if fixed else "at the compute optimum")
    axes.set(ylim=(len(names) - 0.4, -0.6), xlabel=f"loss minus {reference} (nats per token)")
    handles = []
    for (budget, size), marker in markers.items():
        named = style.budget_title(budget) + f", {style.size_label(size)}" * (fixed and len(sizes) > 1)
        handles.append(Line2D([], [], marker=marker, label=named, linestyle="none", color=style.COLOURS["dense"]))
    style.legend(figure, handles)
    return figure
