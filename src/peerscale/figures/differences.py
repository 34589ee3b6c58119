"""Differences of loss at the compute optimum, with intervals."""

import textwrap
from collections.abc import Iterable, Mapping
from operator import itemgetter
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from peerscale.figures import style
from peerscale.figures.brackets import bars, hold_rates
from peerscale.figures.markdown import leaves_out_seeds, signed_interval
from peerscale.stats.curves_of_runs import is_dense, same_variant

LABEL_WIDTH = 95
"""Number of letters that fit beside each other: a label of the rows and a line below the axis."""


def to_dense(fits: Mapping[str, Any]) -> dict[tuple[float, str, str], Mapping[str, Any]]:
    """The differences to dense, by budget, size (empty: at the optimum) and method."""
    return {
        (entry["budget"], found["size"], found["method"]): found
        for entry in fits["budgets"]
        for names in [{one[key] for one in entry["differences"] for key in ("method", "reference")}]
        for found in entry["differences"]
        if found["reference"] == same_variant("dense", found["method"], names)
    }


def against_dense(
    differences: Mapping[tuple[float, str, str], Mapping[str, Any]], budget: float, size: str, name: str
) -> str:
    """One of the differences of `to_dense` as a table shows it; `reference` for a dense model that has none."""
    found = differences.get((budget, size, name))
    return "reference" if found is None and is_dense(name) else signed_interval(found)


def differences_figure(fits: Mapping[str, Any], *, methods: Iterable[str] = (), note: str = "") -> Figure | None:
    """All methods against dense: a row per method, with a point and its interval per budget or size; None without any.

    `fits` is the study's `fits.json`; `methods` are all methods of the study, so that colours are the same in all its
    figures.
    """
    shown = {place: found for place, found in to_dense(fits).items() if found.get("value") is not None}
    reference = "dense's"
    if len({found["reference"] for found in shown.values()}) > 1:  # so a dense model has another zero than its settings
        shown = {place: found for place, found in shown.items() if not is_dense(place[2])}
        reference = "that of dense with the same settings"
    if not shown:
        return None
    names = style.ordered(name for _, _, name in shown)
    fixed = all(size for _, size, _ in shown)
    groups = {place: (place[0], place[1] * fixed) for place in shown}  # of points with one marker
    markers = style.markers(groups.values())
    colours, grey = style.colours([*methods, *names]), style.COLOURS["dense"]
    flagged = style.flagged_minima(fits)
    optima = {place: found for place, found in shown.items() if not place[1]}
    doubtful = {place for place, found in optima.items() if style.compares_flagged(flagged, place[0], found)}
    hollow = {place for place in shown if place[1] and not fixed} | doubtful
    of_name = {name: sorted((place for place in shown if place[2] == name), key=itemgetter(0)) for name in names}
    apart = 0.8 / max(map(len, of_name.values()))  # of two points, in rows
    with style.applied():
        figure, (axes,) = style.panels(1, height=0.55 + 0.36 * len(names))
        axes.axvline(0, color=grey, linewidth=0.9)
        for place, found in shown.items():
            name, look = place[2], {"color": colours[place[2]], "markersize": 5}
            beside = of_name[name].index(place) - (len(of_name[name]) - 1) / 2
            height = names.index(name) + beside * apart
            if place in hollow:
                look["markerfacecolor"] = "white"
            axes.plot([found["low"], found["high"]], [height, height], color=colours[name], label=f"_interval {name}")
            axes.plot([found["value"]], [height], markers[groups[place]], **look, label=name)
        rows = [style.label(name) for name in names]
        axes.set_yticks(range(len(names)), rows)
        axes.grid(visible=False, axis="y")
        sizes = list(dict.fromkeys(style.size_label(size) for _, size, _ in shown))
        where = f"of {' and '.join(sizes)}" if fixed else "at the compute optimum"
        label = f"loss {where} minus {reference} (nats per token; left is better)"
        axes.set(ylim=(len(names) - 0.4, -0.6), xlabel=textwrap.fill(label, LABEL_WIDTH - max(map(len, rows))))
        handles = []
        for (budget, size), marker in markers.items():
            named = style.budget_title(budget) + f", {style.size_label(size)}" * (fixed and len(sizes) > 1)
            handles.append(Line2D([], [], marker=marker, label=named, linestyle="none", color=grey))
        style.legend(figure, handles)
        labels = dict.fromkeys(style.size_label(size) for _, size, _ in shown if size)
        at = ", ".join(text.removeprefix("d_model ") if i else text for i, text in enumerate(labels))
        why = [f"compared at equal size ({at}), since there are too few for a curve"] * bool(hollow - doubtful)
        at_sizes = f"Hollow: {'; '.join([*why, *['flagged minimum (table.md)'] * bool(doubtful)])}." * bool(hollow)
        rates = " and from learning rates" if hold_rates(fits) else " alone"
        sources = bars(fits).replace("misfit of sizes, seeds", "seeds (pooled)") if fixed else bars(fits)
        if all(map(leaves_out_seeds, shown.values())):
            sources = f"bars: 95 % interval from the sampling of validation sequences{rates}; there is one seed"
        unknown = [(name, budget) for (budget, _, name), found in shown.items() if leaves_out_seeds(found)]
        places = dict.fromkeys(f"{style.label(name)} at {style.budget_title(budget)}" for name, budget in unknown)
        seedless = f"bars of {', '.join(places)} leave seeds out" * (0 < len(unknown) < len(shown))
        style.caption(figure, note, at_sizes, sources, seedless)
    return figure
