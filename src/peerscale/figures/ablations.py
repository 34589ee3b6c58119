"""The effect of a layer's settings at one size and budget (paper, figures 3a, 3b and 4)."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from peerscale.figures import style
from peerscale.figures.isoflop import X_LABELS
from peerscale.figures.published import DENSE, LAYER, WITHOUT_NORM, paper_values
from peerscale.stats.curve import Curve
from peerscale.stats.seeds import over_seeds

APART = 1.03
"""Factor between the x values of neighbouring lines whose points would cover each other."""

LABELS = {**X_LABELS, "n_experts": "experts", "ffn_heads": "heads"}

LEVEL: style.Look = {"color": style.GREY, "linewidth": 0.9, "linestyle": "--", "zorder": 1}
"""The line of the baseline."""

PAPER = Curve(LAYER)

NORM: Mapping[bool, style.Look] = {
    True: {"color": style.COLOURS[LAYER], "marker": "o", "linestyle": "-", "label": "PEER with query BatchNorm"},
    False: {"color": "#d55e00", "marker": "s", "linestyle": "--", "label": "without"},
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


def means(
    runs: pd.DataFrame, series: str, x: str, y: str = "val_loss", transform: Callable[[Any], Any] = np.exp
) -> pd.DataFrame:
    """Means over seeds with their intervals, for `points_panel`.

    Args:
        runs: finished rows.
        series, x, y: columns of the lines, of the x axis and of the y axis.
        transform: from `y` to the drawn value; by default from loss to perplexity.
    """
    found = over_seeds(runs, [series, x], y)
    ends = {"y": "mean", "low": "low", "high": "high"}
    heights = {name: transform(found[column]) for name, column in ends.items()}
    return pd.DataFrame({"series": found[series], "x": found[x].astype(float), "seeds": found["seeds"], **heights})


def _small_print(drawn: pd.DataFrame) -> str:
    """What the bars of `means` are."""
    return style.INTERVALS + " over seeds" + "; of one seed, a standard error" * bool(drawn["seeds"].min() == 1)


def printed(published: pd.DataFrame, metric: str, methods: Mapping[Any, str]) -> pd.DataFrame:
    """The paper's table 2 for `points_panel`; `methods` are its names of the series."""
    values = {series: paper_values(published, "table 2", name, metric) for series, name in methods.items()}
    return pd.DataFrame([{"series": s, "x": x, "y": y} for s, each in values.items() for x, y in each.items()])


@style.applied()
def experts_figure(done: pd.DataFrame, published: pd.DataFrame, baseline: str) -> Figure:
    """Figure 3a: perplexity against the number of experts, beside the paper's figure, with numbers of its table 2.

    The paper's dense model is that of table 1 at 6e18 FLOPs, as table 2 does not name its budget. `done` are finished
    runs with their `curve`.
    """
    is_baseline = done["curve"].map(lambda curve: curve.method == baseline)
    cells, level, where = _at_one_size(done[with_norm(done) | is_baseline], baseline)
    looks = {
        curve: style.changed(look, label=style.label(curve))
        for curve, look in style.looks({PAPER, *cells["layer"]}).items()
    }
    figure, (ours, paper) = style.panels(2)
    drawn = means(cells, "layer", "n_experts")
    _draw(ours, drawn, looks, "n_experts", where, level)
    dense = [paper_values(published, "table 1", DENSE, "ppl_c4")[6e18]]
    _draw(paper, printed(published, "ppl_c4", {PAPER: LAYER}), looks, "n_experts", "the paper, on C4", dense)
    style.legend(figure, [_level(baseline), *looks.values()])
    style.caption(figure, _small_print(drawn))
    return figure


@style.applied()
def active_figure(done: pd.DataFrame, baseline: str) -> Figure:
    """Figure 3b: perplexity against heads, one line per number of active experts. The paper gives no numbers for it."""
    cells, level, where = _at_one_size(done, baseline)
    numbers = sorted(cells["active_experts"].unique())
    shades = matplotlib.colormaps["viridis"](np.linspace(0.92, 0, len(numbers)))
    looks = {
        n: {"color": to_hex(shade), "marker": marker, "linestyle": "-", "label": f"{n:g} active"}
        for n, shade, marker in zip(numbers, shades, itertools.cycle(style.MARKERS), strict=False)
    }
    figure, (axes,) = style.panels(1)
    drawn = means(cells, "active_experts", "ffn_heads")
    _draw(axes, drawn, looks, "ffn_heads", where, level, apart=APART)
    style.legend(figure, [*looks.values(), *[_level(baseline)] * len(level)])
    style.caption(figure, _small_print(drawn))
    return figure


@style.applied()
def query_norm_figure(done: pd.DataFrame, published: pd.DataFrame, baseline: str) -> Figure:
    """Figure 4 and table 2: perplexity and unevenness with and without query BatchNorm, against the number of experts.

    The middle panel and the dotted lines on the right are the paper's table 2.
    """
    cells, _, where = _at_one_size(done, baseline)
    cells, x, theirs = cells.assign(norm=with_norm(cells)), "n_experts", {True: LAYER, False: WITHOUT_NORM}
    dotted = {norm: style.changed(look, linestyle=":", label="_paper") for norm, look in NORM.items()}
    figure, (left, middle, right) = style.panels(3)
    # Numbers of experts differ by factors of four, so that the lines can be further apart.
    drawn = means(cells, "norm", x)
    _draw(left, drawn, NORM, x, where, apart=APART**4)
    _draw(middle, printed(published, "ppl_c4", theirs), NORM, x, "the paper, on C4")
    uneven, of_paper = means(cells, "norm", x, "unevenness", np.asarray), printed(published, "unevenness", theirs)
    style.points_panel(right, uneven, NORM, apart=APART**4)
    style.points_panel(right, of_paper, dotted)
    _ticks(right, x, [*uneven["x"], *of_paper["x"]])
    right.set(title=where, ylabel="unevenness: distance of the\nuse of experts from equal (nats)", ylim=(0, None))
    style.legend(figure, [*NORM.values()])
    style.caption(figure, _small_print(drawn))
    style.caption(figure, "dotted: the paper")
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


def _draw(
    axes: Axes, table: pd.DataFrame, looks: Mapping[Any, style.Look], x: str, title: str,
    levels: Iterable[float] = (), *, apart: float = 1.0,
) -> None:  # fmt: skip
    """A panel of perplexities, with lines at the levels of the baseline."""
    style.points_panel(axes, table, looks, apart=apart)
    for level in levels:
        axes.axhline(level, **LEVEL, label="_baseline")
    axes.set(title=title, ylabel="perplexity", yscale="log")
    axes.margins(y=0.08)
    axes.autoscale_view()
    style.log_axis(axes.yaxis, *axes.get_ylim())
    _ticks(axes, x, table["x"])


def _ticks(axes: Axes, x: str, values: Iterable[float]) -> None:
    """A logarithmic x axis with a tick at each value; numbers of experts are written as squares, as in the paper."""
    axes.set_xlabel(LABELS[x])
    ticks = sorted(set(values))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    labels = [f"${math.isqrt(int(n))}^2$" if x == "n_experts" else f"{n:g}" for n in ticks]
    width = axes.get_position().width * style.TEXT_WIDTH
    crowded = len(ticks) > 4 * width  # a label takes about a quarter of an inch
    axes.set_xticklabels(labels, rotation=90 if crowded else 0)


def _level(baseline: str) -> style.Look:
    return style.changed(LEVEL, label=style.label(Curve(baseline)))
