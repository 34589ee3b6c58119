"""The effect of a layer's settings at one size and budget (paper, figures 3a, 3b and 4)."""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator
from scipy.stats import t as student

from peerscale.figures import style
from peerscale.figures.isoflop import X_LABELS
from peerscale.figures.published import WITHOUT_NORM, paper_values
from peerscale.stats.curves_of_runs import axes_of, method_names, usable

SETTINGS = ("n_experts", "ffn_heads", "top_k", "query_norm", "lr", "table_lr", "batch_sequences")
"""Columns that a study can vary at one size."""

APART = 1.03
"""Factor between the x values of neighbouring lines whose points would cover each other."""

LABELS = {**X_LABELS, "n_experts": "experts", "ffn_heads": "heads"}

Looks = Mapping[Hashable, Mapping[str, Any]]
"""Arguments of matplotlib's `plot` for each line."""

DENSE: Mapping[str, Any] = {"color": style.COLOURS["dense"], "linewidth": 0.9, "linestyle": "--", "zorder": 1}

NORM: Looks = {
    True: {"color": style.COLOURS["peer"], "marker": "o", "label": "PEER with BatchNorm on the queries"},
    False: {"color": "#d55e00", "marker": "s", "label": "without"},
}


def layer_names(runs: pd.DataFrame) -> pd.Series:
    """`<method>[_<variant>]` of each row, without the study's other axes."""
    return method_names(runs).str.split(" ").str[0]


def varied(runs: pd.DataFrame) -> set[str]:
    """The `SETTINGS` that take several values among the finished runs of one layer, size and budget.

    A learning rate counts only if the study sets it: by the law of rates it differs with every setting that changes a
    cell's tokens.
    """
    groups = runs[usable(runs)].assign(layer=layer_names(runs)).groupby(["layer", "size", "budget"])
    not_set = {"lr", "table_lr"} - {key.removeprefix("optim.") for axes in axes_of(runs) for key in axes}
    columns = [column for column in SETTINGS if column in runs and column not in not_set]
    return {column for column in columns if (groups[column].nunique() > 1).any()}


def with_norm(runs: pd.DataFrame) -> pd.Series:
    """Which rows have BatchNorm on their queries; read from CSV, the column may hold text or objects."""
    return runs["query_norm"].astype(str) == "True"


def over_seeds(runs: pd.DataFrame, by: Sequence[str], y: str = "val_loss") -> pd.DataFrame:
    """One row per combination of `by`, with the mean of `y` over seeds and an interval.

    Returns:
        `by`, mean, low, high, seeds. The interval is Student's 95 % interval of the mean over seeds, whose scatter is
        pooled over all rows, as in `runs.comparison`. With one seed the interval is +-1 standard error over validation
        sequences if `y` is the loss, and otherwise empty (low = high = mean).
    """
    rows, groups = [], runs.groupby(list(by))
    scatter = runs[y].astype(float) - groups[y].transform("mean").astype(float)
    pooled_df = len(runs) - groups.ngroups
    for key, group in groups:
        values, n = np.asarray(group[y], float), len(group)
        if n > 1:
            half = float(student.ppf(0.975, pooled_df) * math.sqrt((scatter**2).sum() / pooled_df / n))
        else:
            half = float(np.nan_to_num(group["val_loss_se"].iloc[0])) if y == "val_loss" else 0.0
        rows.append((*key, values.mean(), values.mean() - half, values.mean() + half, n))
    return pd.DataFrame(rows, columns=[*by, "mean", "low", "high", "seeds"])


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
        middle, low, high = (transform(rows[column].astype(float)) for column in ("mean", "low", "high"))
        style.points(axes, shift * rows[x].astype(float), middle, bars=(low, high), line="-", **look)
        if (rows["seeds"] > 1).any():
            dots = {"color": look["color"], "alpha": 0.4, "markersize": 3, "label": "_seeds"}
            axes.plot(shift * cells[x].astype(float), transform(cells[y].astype(float)), ".", **dots)
    _ticks(axes, x, points[x])


@style.applied()
def experts_figure(runs: pd.DataFrame, published: pd.DataFrame) -> Figure:
    """Figure 3a: perplexity against the number of experts, beside the paper's figure, with numbers of its table 2.

    The paper's dense model is that of table 1 at 6e18 FLOPs, as table 2 does not name its budget.
    """
    cells, dense, where = _at_one_size(runs[with_norm(runs) | (runs["method"] == "dense")])
    names = style.ordered(cells["name"])
    colours, markers = style.colours(["dense", "peer", *names]), style.method_markers({*names, "peer"})
    looks: dict[Hashable, dict[str, Any]] = {
        name: {"color": colours[name], "marker": markers[name], "label": style.label(name)}
        for name in style.ordered({*names, "peer"})
    }
    figure, (ours, paper) = style.panels(2)
    lines_panel(ours, cells, x="n_experts", series="name", looks={name: looks[name] for name in names})
    _perplexity(ours, where, dense)
    values = paper_values(published, "table 2", "peer", "ppl_c4")
    style.points(paper, [*values], [*values.values()], line="-", **looks["peer"])
    _ticks(paper, "n_experts", values)
    _perplexity(paper, "the paper, on C4", [paper_values(published, "table 1", "dense", "ppl_c4")[6e18]])
    style.legend(figure, [Line2D([], [], **DENSE, label="dense"), *map(_handle, looks.values())])
    return figure


@style.applied()
def active_figure(runs: pd.DataFrame) -> Figure:
    """Figure 3b: perplexity against heads, one line per number of active experts; a star at each line's lowest point.

    The paper gives no numbers for it.
    """
    cells, dense, where = _at_one_size(runs)
    cells = cells[cells["method"] == "peer"]
    levels = sorted(cells["active_experts"].unique())
    shades = matplotlib.colormaps["viridis"](np.linspace(0.92, 0, len(levels)))
    looks = {
        level: {"color": to_hex(shade), "marker": style.MARKERS[i % len(style.MARKERS)], "label": f"{level:g}"}
        for i, (level, shade) in enumerate(zip(levels, shades, strict=True))
    }
    figure, (axes,) = style.panels(1)
    lines_panel(axes, cells, x="ffn_heads", series="active_experts", looks=looks, apart=APART)
    for level, rows in over_seeds(cells, ["active_experts", "ffn_heads"]).groupby("active_experts"):
        if len(rows) > 1:
            heads, losses = rows[["ffn_heads", "mean"]].to_numpy(float).T
            best = losses.argmin()
            x = heads[best] * APART ** (levels.index(level) - (len(levels) - 1) / 2)
            style.star(axes, x, math.exp(losses[best]), looks[level]["color"], f"_best {level:g}")
    _perplexity(axes, where, dense)
    handles = [*map(_handle, looks.values()), *([Line2D([], [], **DENSE, label="dense")] if dense else [])]
    figure.legend(handles=handles, loc="outside right center", title="active experts\n(heads × top-k)")
    return figure


@style.applied()
def query_norm_figure(runs: pd.DataFrame, published: pd.DataFrame) -> Figure:
    """Figure 4 and table 2: perplexity and unevenness with and without query BatchNorm, against the number of experts.

    The middle panel and the dotted lines on the right are the paper's table 2.
    """
    cells, _, where = _at_one_size(runs[runs["method"] == "peer"])
    cells, x = cells.assign(norm=with_norm(cells)), "n_experts"
    figure, (ours, paper, unevenness) = style.panels(3)
    # Numbers of experts differ by factors of four, so that the lines can be further apart.
    lines: dict[str, Any] = {"x": x, "series": "norm", "looks": NORM, "apart": APART**4}
    lines_panel(ours, cells, **lines)
    lines_panel(unevenness, cells, **lines, y="unevenness", transform=np.asarray)
    for norm, look in NORM.items():
        method = "peer" if norm else WITHOUT_NORM
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


def _at_one_size(runs: pd.DataFrame) -> tuple[pd.DataFrame, list[float], str]:
    """The size and budget with the most finished runs: its sparse runs, its mean dense perplexity, and a title."""
    done = runs.assign(name=layer_names(runs))[usable(runs)]
    budget, size = done[["budget", "size"]].value_counts().index[0]
    cells = done[(done["budget"] == budget) & (done["size"] == size)]
    dense = cells["method"] == "dense"
    title = f"{style.budget_title(budget)}, {style.size_label(str(size))}"
    level = [float(np.exp(cells.loc[dense, "val_loss"].astype(float).mean()))] if dense.any() else []
    return cells[~dense], level, title


def _perplexity(axes: Axes, title: str, dense: Iterable[float] = ()) -> None:
    for level in dense:
        axes.axhline(level, **DENSE, label="_dense")
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
