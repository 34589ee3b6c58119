"""Differences of loss to the baseline, at the compute optimum or at one size, with intervals."""

from collections.abc import Iterable, Mapping
from operator import itemgetter
from typing import Any

from matplotlib.figure import Figure

from peerscale.figures import style
from peerscale.figures.markdown import signed_interval
from peerscale.stats.curve import Curve

Differences = dict[tuple[float, str, Curve], Mapping[str, Any]]
"""By budget, size (empty: at the optimum) and curve."""


def to_baseline(fits: Mapping[str, Any]) -> Differences:
    """The differences of each curve to the baseline with the same settings, or else to the baseline as configured."""
    return {
        (entry["budget"], found["size"], found["method"]): found
        for entry in fits["budgets"]
        for among in [{one[key] for one in entry["differences"] for key in ("method", "reference")}]
        for found in entry["differences"]
        if found["reference"] == found["method"].counterpart(fits["baseline"], among)
    }


def difference_column(fits: Mapping[str, Any]) -> str:
    """The heading of differences to the baseline."""
    return f"difference to {style.label(Curve(fits['baseline']))}"


def shown_difference(fits: Mapping[str, Any], found: Mapping[str, Any] | None, curve: Curve) -> str:
    """One of the differences `to_baseline` as a table shows it; `reference` for a baseline that has none."""
    return "reference" if found is None and curve.method == fits["baseline"] else signed_interval(found)


@style.applied()
def differences_figure(fits: Mapping[str, Any], curves: Iterable[Curve] = ()) -> Figure | None:
    """All curves against the baseline: a row per curve, with a point and its interval per budget or size.

    None without any difference. `curves` are all those of the study, so that colours are the same in all its figures.
    Points from a flagged minimum are hollow, and so are points at one size beside others at the optimum.
    """
    shown = {place: found for place, found in to_baseline(fits).items() if found.get("value") is not None}
    reference = f"{style.label(Curve(fits['baseline']))}'s"
    if len({found["reference"] for found in shown.values()}) > 1:  # the baseline's own settings have another zero
        shown = {place: found for place, found in shown.items() if place[2].method != fits["baseline"]}
        reference += " with the same settings"
    if not shown:
        return None
    rows = style.ordered(curve for _, _, curve in shown)
    fixed = all(size for _, size, _ in shown)
    groups = {place: (place[0], place[1] * fixed) for place in shown}  # of points with one marker
    markers = style.markers(groups.values())
    colours, flagged = style.colours([*curves, *rows]), style.flagged_minima(fits)
    of_row = {row: sorted((place for place in shown if place[2] == row), key=itemgetter(0)) for row in rows}
    most = max(map(len, of_row.values()))
    figure, (axes,) = style.panels(1, height=0.6 + (0.16 + 0.06 * most) * len(rows))
    axes.axvline(0, color=style.GREY, linewidth=0.9, zorder=1)  # below the labels, and these below the points
    for place, found in shown.items():
        budget, size, curve = place
        height = rows.index(curve) + (of_row[curve].index(place) - (len(of_row[curve]) - 1) / 2) * 0.8 / most
        hollow = not fixed if size else style.compares_flagged(flagged, budget, found)
        look = {"color": colours[curve], "markerfacecolor": "white" if hollow else colours[curve], "markersize": 5}
        axes.plot([found["low"], found["high"]], [height, height], color=colours[curve], label=f"_interval {curve}")
        axes.plot([found["value"]], [height], markers[groups[place]], **look, label=str(curve))
        if size and not fixed:
            text = f" {style.size_label(size).partition(' (')[0]}"
            behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.2}
            axes.text(found["high"], height, text, fontsize=5.5, verticalalignment="center", bbox=behind, zorder=1.5)
    axes.set_yticks(range(len(rows)), [style.label(curve) for curve in rows])
    axes.grid(visible=False, axis="y")
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlabel=f"loss minus {reference} (nats per token)")
    budgets, sizes = ({*each} for each in zip(*markers, strict=True))
    common = [style.budget_title(budget) for budget in budgets if len(budgets) == 1]
    common += [style.size_label(size) for size in sizes if fixed and len(sizes) == 1]
    axes.set_title(", ".join([*common, *["at the compute optimum"] * (not fixed)]))
    handles: list[style.Look] = []
    for (budget, size), marker in markers.items():
        apart = [style.budget_title(budget)] * (len(budgets) > 1) + [style.size_label(size)] * (len(sizes) > 1)
        handles.append({"marker": marker, "label": ", ".join(apart), "linestyle": "none", "color": style.GREY})
    if len(handles) > 1:
        style.legend(figure, handles)
    style.caption(figure, style.INTERVALS)
    hollow = any(place[1] or style.compares_flagged(flagged, place[0], found) for place, found in shown.items())
    style.caption(figure, "hollow: at one size, or from a flagged minimum" if hollow and not fixed else "")
    return figure
