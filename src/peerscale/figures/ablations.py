"""The effect of a layer's settings at one size and budget (paper, figures 3a, 3b and 4)."""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from peerscale.figures import style
from peerscale.figures.isoflop import X_LABELS
from peerscale.figures.published import DENSE, LAYER, WITHOUT_NORM, paper_values
from peerscale.stats.curve import Curve
from peerscale.stats.seeds import over_seeds

APART = 1.03
"""Factor between the x values of neighbouring lines whose points would cover each other."""

LABELS = {**X_LABELS, "n_experts": "experts", "ffn_heads": "heads"}

Looks = Mapping[Hashable, Mapping[str, Any]]
"""Arguments of matplotlib's `plot` for each line."""

LEVEL: Mapping[str, Any] = {"color": style.GREY, "linewidth": 0.9, "linestyle": "--", "zorder": 1}
"""The line of the baseline."""

PAPER = Curve(LAYER)

NORM: Looks = {
    True: {
        "color": style.COLOURS[LAYER],
        "marker": "o",
        "label": f"{style.label(PAPER)} with BatchNorm on the queries",
    },
    False: {"color": "#d55e00", "marker": "s", "label": "without"},
}


def varied(curves: Iterable[Curve]) -> set[str]:
    """The settings that take several values among the curves of one method."""
    of_method: dict[str, list[dict[str, Any]]] = {}
    for curve in set(curves):
        of_method.setdefault(curve.method, []).append(dict(curve.settings))
    return {
        key
        for each in of_method.values()
        for key in {key for settings in each for key in settings}
        if len({settings.get(key) for settings in each}) > 1
    }


def with_norm(runs: pd.DataFrame) -> pd.Series:
    """Which rows have BatchNorm on their queries; read from CSV, the column may hold text or objects."""
    return runs["query_norm"].astype(str) == "True"


def lines_panel(
    axes: Axes,
    runs: pd.DataFrame,
    *,
    x: str,
    series: str,
    looks: Looks,
    y: str = "val_loss",
    transform: Callable[[Any], Any] = np.exp,
    apart: float = 1.0,
) -> None:
    """A line per value of `series` through the means over seeds, with intervals; single seeds are pale dots.

    Args:
        axes: where to draw.
        runs: finished rows.
        x, y, series: columns of the x axis (logarithmic, with a tick at each value), of the y axis, and of the line.
        looks: colour, marker and label of each line, by value of `series`.
        transform: from `y` to the drawn value; by default from loss to perplexity.
        apart: factor between the x values of neighbouring lines, so that their intervals do not cover each other.
    """
    points = over_seeds(runs, [series, x], y)
    for i, (value, look) in enumerate(looks.items()):
        shift = apart ** (i - (len(looks) - 1) / 2)
        rows, cells = points[points[series] == value], runs[runs[series] == value]
        middle, low, high = (transform(rows[column]) for column in ("mean", "low", "high"))
        style.points(axes, shift * rows[x].astype(float), middle, bars=(low, high), line="-", **look)
        if (rows["seeds"] > 1).any():
            dots = {"color": look["color"], "alpha": 0.4, "markersize": 3, "label": "_seeds"}
            axes.plot(shift * cells[x].astype(float), transform(cells[y].astype(float)), ".", **dots)
    _ticks(axes, x, points[x])


@style.applied()
def experts_figure(done: pd.DataFrame, published: pd.DataFrame, baseline: str) -> Figure:
    """Figure 3a: perplexity against the number of experts, beside the paper's figure, with numbers of its table 2.

    The paper's dense model is that of table 1 at 6e18 FLOPs, as table 2 does not name its budget. `done` are finished
    runs with their `curve`.
    """
    is_baseline = done["curve"].map(lambda curve: curve.method == baseline)
    cells, level, where = _at_one_size(done[with_norm(done) | is_baseline], baseline)
    layers = style.ordered({PAPER, *cells["layer"]})
    colours, markers = style.colours([Curve(baseline), *layers]), style.method_markers(layers)
    looks = {
        layer: {"color": colours[layer], "marker": markers[layer], "label": style.label(layer)} for layer in layers
    }
    figure, (ours, paper) = style.panels(2)
    lines_panel(ours, cells, x="n_experts", series="layer", looks={k: looks[k] for k in style.ordered(cells["layer"])})
    _perplexity(ours, where, level)
    values = paper_values(published, "table 2", LAYER, "ppl_c4")
    style.points(paper, [*values], [*values.values()], line="-", **looks[PAPER])
    _ticks(paper, "n_experts", values)
    _perplexity(paper, "the paper, on C4", [paper_values(published, "table 1", DENSE, "ppl_c4")[6e18]])
    style.legend(figure, [_level_handle(baseline), *map(_handle, looks.values())])
    return figure


@style.applied()
def active_figure(done: pd.DataFrame, baseline: str) -> Figure:
    """Figure 3b: perplexity against heads, one line per number of active experts; a star at each line's lowest point.

    The paper gives no numbers for it.
    """
    cells, level, where = _at_one_size(done, baseline)
    levels = sorted(cells["active_experts"].unique())
    shades = matplotlib.colormaps["viridis"](np.linspace(0.92, 0, len(levels)))
    looks = {
        level: {"color": to_hex(shade), "marker": style.MARKERS[i % len(style.MARKERS)], "label": f"{level:g}"}
        for i, (level, shade) in enumerate(zip(levels, shades, strict=True))
    }
    figure, (axes,) = style.panels(1)
    lines_panel(axes, cells, x="ffn_heads", series="active_experts", looks=looks, apart=APART)
    for active, rows in over_seeds(cells, ["active_experts", "ffn_heads"]).groupby("active_experts"):
        if len(rows) > 1:
            heads, losses = rows[["ffn_heads", "mean"]].to_numpy(float).T
            best = losses.argmin()
            x = heads[best] * APART ** (levels.index(active) - (len(levels) - 1) / 2)
            style.star(axes, x, math.exp(losses[best]), looks[active]["color"], f"_best {active:g}")
    _perplexity(axes, where, level)
    handles = [*map(_handle, looks.values()), *([_level_handle(baseline)] if level else [])]
    figure.legend(handles=handles, loc="outside right center", title="active experts\n(heads × top-k)")
    return figure


@style.applied()
def query_norm_figure(done: pd.DataFrame, published: pd.DataFrame, baseline: str) -> Figure:
    """Figure 4 and table 2: perplexity and unevenness with and without query BatchNorm, against the number of experts.

    The middle panel and the dotted lines on the right are the paper's table 2.
    """
    cells, _, where = _at_one_size(done, baseline)
    cells, x = cells.assign(norm=with_norm(cells)), "n_experts"
    figure, (ours, paper, unevenness) = style.panels(3)
    # Numbers of experts differ by factors of four, so that the lines can be further apart.
    lines: dict[str, Any] = {"x": x, "series": "norm", "looks": NORM, "apart": APART**4}
    lines_panel(ours, cells, **lines)
    lines_panel(unevenness, cells, **lines, y="unevenness", transform=np.asarray)
    for norm, look in NORM.items():
        method = LAYER if norm else WITHOUT_NORM
        for axes, metric, line in ((paper, "ppl_c4", "-"), (unevenness, "unevenness", ":")):
            values = paper_values(published, "table 2", method, metric)
            unnamed: dict[str, Any] = {**look, "label": "_paper"}
            style.points(axes, [*values], [*values.values()], line=line, **unnamed)
            _ticks(axes, x, [*values, *(cells[x] if axes is unevenness else ())])
    _perplexity(ours, where)
    _perplexity(paper, "the paper, on C4")
    unevenness.set(title="unevenness (nats)", ylim=(0, None))
    style.legend(figure, [_handle(look) for look in NORM.values()])
    return figure


def _at_one_size(done: pd.DataFrame, baseline: str) -> tuple[pd.DataFrame, list[float], str]:
    """The size and budget with the most runs: those of other methods with their `layer`, the mean perplexity of the
    baseline, and a title."""
    budget, size = done[["budget", "size"]].value_counts().index[0]
    cells = done[(done["budget"] == budget) & (done["size"] == size)]
    cells = cells.assign(layer=cells["curve"].map(lambda curve: curve.plain))
    is_baseline = cells["layer"] == Curve(baseline)
    title = f"{style.budget_title(budget)}, {style.size_label(str(size))}"
    losses = cells.loc[is_baseline, "val_loss"].astype(float)
    return cells[~is_baseline], [float(np.exp(losses.mean()))] if len(losses) else [], title


def _perplexity(axes: Axes, title: str, levels: Iterable[float] = ()) -> None:
    for level in levels:
        axes.axhline(level, **LEVEL, label="_baseline")
    axes.set_yscale("log")
    axes.margins(y=0.08)
    axes.autoscale_view()
    style.log_axis(axes.yaxis, *axes.get_ylim())
    axes.set(title=title, ylabel="perplexity")


def _ticks(axes: Axes, x: str, values: Iterable[float]) -> None:
    """A logarithmic x axis with a tick at each value; numbers of experts are written as squares, as in the paper."""
    axes.set(xscale="log", xlabel=LABELS[x])
    ticks = sorted(set(values))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    labels = [f"${math.isqrt(int(n))}^2$" if x == "n_experts" else f"{n:g}" for n in ticks]
    width = axes.get_position().width * style.TEXT_WIDTH
    crowded = len(ticks) > 4 * width  # a label takes about a quarter of an inch
    axes.set_xticklabels(labels, rotation=90 if crowded else 0)


def _handle(look: Mapping[str, Any]) -> Line2D:
    return Line2D([], [], markeredgewidth=0.5, markeredgecolor="white", **look)


def _level_handle(baseline: str) -> Line2D:
    return Line2D([], [], **LEVEL, label=style.label(Curve(baseline)))
