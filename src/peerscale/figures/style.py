"""The common style of all figures and tables: a colour, marker and line per method, stars at minima, hollow if flagged.

Figures are made without pyplot, so that drawing has no global state and needs no display.
"""

import json
import math
import re
import textwrap
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from peerscale.files import replacing
from peerscale.stats.curve import Curve
from peerscale.stats.optima import OptimumStatus

TEXT_WIDTH = 5.5
"""Width of the text of a one-column paper in inches, so that most figures are printed unscaled."""

PANEL_WIDTH = 1.7
"""Least width of a panel in inches; a row of four or five makes the figure wider than the text."""

CHARACTERS_PER_INCH = 26
"""Of small print."""

INTERVALS = "bars: 95 % intervals"
"""Small print."""

GREY = "#4d4d4d"
"""Lines of zero differences and of the baseline."""

COLOURS = {
    "dense": GREY,
    "moe": "#e69f00",
    "moe_token_choice": "#cc79a7",
    "pkm": "#009e73",
    "peer": "#0072b2",
}
"""Okabe and Ito's palette, which remains distinguishable with all common forms of colour blindness."""

SPARE_COLOURS = ("#d55e00", "#56b4e9", "#882255", "#999933", "#661100", "#44aa99", "#aa4499")
"""Colours of other layers."""

LABELS = {
    "dense": "dense",
    "moe": "MoE (expert choice)",
    "moe_token_choice": "MoE (token choice)",
    "fine_grained_moe": "fine-grained MoE",
    "wide_dense": "wide dense",
    "no_layer": "no layer",
    "pkm": "PKM",
    "pkm_equal_top_k": "PKM, PEER's top k",
    "peer": "PEER",
    "swiglu": "SwiGLU",
    "relu_squared": "ReLU²",
    "balanced_moe": "MoE (fine-grained, balanced)",
    "memory_plus": "Memory+",
    "engram": "Engram",
}

SETTINGS: dict[tuple[str, Any], str] = {
    ("n_heads", 1): "1 head",
    ("query_norm", True): "BatchNorm",
    ("query_norm", False): "no BatchNorm",
    ("lr_rule", "constant"): "rate set directly",
    ("name", "adamw"): "AdamW",
    ("name", "row_sparse_adamw"): "row-sparse AdamW",
}
"""Text for values of settings."""

OTHER_VALUES = {
    "batch_sequences": "batch {}",
    "n_experts": "{} experts",
    "n_heads": "{} heads",
    "top_k": "top {}",
    "lr": "rate {}",
    "table_lr": "table rate {}",
    "warmup_steps": "{} warm-up steps",
}
"""Text for all other values of a setting."""

MARKERS = ("o", "s", "D", "v", "^", "<", "p", "P", ">", "X", "d", "h")
"""Markers of methods or budgets."""

LINES = (
    "-", ":", "--", "-.", (0, (7, 1.5)), (0, (4, 1, 1, 1, 1, 1)), (0, (1, 2.5)),
    (0, (10, 2)), (0, (8, 2, 2, 2)), (0, (3, 2.5)), (0, (6, 1, 1, 1)), (0, (2, 1, 1, 1)),
)  # fmt: skip
"""Lines of methods, told apart without colour; a line per marker."""

Look = Mapping[str, Any]
"""Arguments of matplotlib's `plot`."""

RC = {
    "font.family": "STIXGeneral",
    "mathtext.fontset": "stix",
    **dict.fromkeys(("font.size", "axes.labelsize", "axes.titlesize"), 9),
    **dict.fromkeys(("legend.fontsize", "xtick.labelsize", "ytick.labelsize"), 8),
    **dict.fromkeys(("axes.linewidth", "xtick.major.width", "ytick.major.width"), 0.6),
    **dict.fromkeys(("xtick.minor.width", "ytick.minor.width"), 0.4),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "legend.columnspacing": 1.2,
    "pdf.fonttype": 42,
    "savefig.dpi": 220,
}

NO_METADATA = {"png": {"Software": None}, "pdf": {"Creator": None, "Producer": None, "CreationDate": None}}
"""Metadata without dates and versions, so that the same figure gives the same bytes."""


def ordered(curves: Iterable[Curve]) -> list[Curve]:
    """Curves, each once: those of known methods in the order of the palette, then others by name."""
    known = [*COLOURS]
    return sorted({*curves}, key=lambda one: (known.index(one.method) if one.method in known else len(known), one))


def colours(curves: Iterable[Curve]) -> dict[Curve, str]:
    """A colour per curve: the colour of its method or, for several variants, shades of it from light to dark.

    The method with its usual settings keeps the colour, and its variants are lighter. An unknown method's colour
    depends on its name alone, unless two would share one.
    """
    variants: dict[str, list[Curve]] = {}
    for curve in ordered(curves):
        variants.setdefault(curve.method, []).append(curve)
    chosen: dict[str, str] = {}
    for method in variants:
        slot = zlib.crc32(method.encode()) % len(SPARE_COLOURS)
        spare = SPARE_COLOURS[slot:] + SPARE_COLOURS[:slot]
        chosen[method] = COLOURS.get(method) or next((c for c in spare if c not in chosen.values()), spare[0])
    found: dict[Curve, str] = {}
    for method, members in variants.items():
        found |= dict.fromkeys(members, chosen[method])
        if len(members) > 1:
            others = [curve for curve in members if curve.settings]
            darkest = 0.6 if len(others) < len(members) else 1.0
            found |= {n: shaded(chosen[method], darkest * (i + 0.5) / len(others)) for i, n in enumerate(others)}
    return found


def shaded(colour: str, place: float) -> str:
    """A colour mixed with white (`place` below 2/3; most white at 0) or with black (above 2/3; most black at 1)."""
    end, share = (1.0, 0.6 - 0.9 * place) if place < 2 / 3 else (0.0, 1.5 * place - 1)
    red, green, blue = (channel + share * (end - channel) for channel in to_rgb(colour))
    return to_hex((red, green, blue))


def label(curve: Curve) -> str:
    """A curve as figures and tables name it: `PEER, batch 8`."""
    method = LABELS.get(curve.method, curve.method.replace("_", " "))
    return ", ".join(filter(None, (method, in_words(curve))))


def in_words(curve: Curve) -> str:
    """The settings of a curve: `4,096 experts, AdamW`."""
    words = []
    for key, value in curve.settings:
        name = key.rpartition(".")[2]
        text = value if isinstance(value, str) else f"{value:,}" if type(value) is int else json.dumps(value)
        other = OTHER_VALUES.get(name, name.replace("_", " ") + " {}")
        words.append(SETTINGS.get((name, value)) or other.format(text))
    return ", ".join(words)


def size_label(size: str) -> str:
    """A size as figures and tables write it: `d32-l6-h8` is `d_model 32 (6 layers, 8 heads)`."""
    found = re.fullmatch(r"d(\d+)(?:-l(\d+))?(?:-h(\d+))?", size)
    if found is None:
        return size
    width, depth, heads = found.groups()
    more = ", ".join(f"{n} {what}" for n, what in ((depth, "layers"), (heads, "heads")) if n)
    return f"d_model {width} ({more})" if more else f"d_model {width}"


def markers(groups: Iterable[tuple[float, str]]) -> dict[tuple[float, str], str]:
    """A marker per budget and size, in the order of the budgets."""
    ascending = sorted(dict.fromkeys(groups), key=lambda group: group[0])
    return {group: MARKERS[i % len(MARKERS)] for i, group in enumerate(ascending)}


def looks(curves: Iterable[Curve]) -> dict[Curve, Look]:
    """Colour, marker and line of each curve, in the order of the palette.

    Methods of the palette have the first markers. The marker of another curve depends on its name alone, unless two
    would share one; figures that draw some of a study's curves therefore choose the looks of all.
    """
    chosen, places = colours(curves), {Curve(method): i for i, method in enumerate(COLOURS)}
    for curve in ordered({*chosen} - {*places}):
        slot, spare = zlib.crc32(str(curve).encode()), len(MARKERS) - len(COLOURS)
        free = [len(COLOURS) + (slot + i) % spare for i in range(spare)]
        places[curve] = next((place for place in free if place not in places.values()), free[0])
    return {
        curve: {
            "color": chosen[curve],
            "marker": MARKERS[places[curve]],
            "linestyle": LINES[places[curve]],
        }
        for curve in ordered(chosen)
    }


def changed(look: Look, **changes: Any) -> dict[str, Any]:
    """A look with some of its arguments changed."""
    return {**look, **changes}


def budget_title(budget: float) -> str:
    r"""`$3 \times 10^{11}$ FLOPs`."""
    return f"{power_of_ten(budget)} FLOPs"


def power_of_ten(value: float) -> str:
    r"""`$3 \times 10^{11}$`."""
    mantissa, exponent = f"{value:.2e}".split("e")
    factor = "" if float(mantissa) == 1 else rf"{float(mantissa):g} \times "
    return rf"${factor}10^{{{int(exponent)}}}$"


@contextmanager
def applied() -> Iterator[None]:
    """A context, or decorator of a function, that applies the style to everything drawn inside."""
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **RC}):
        yield


def panels(n: int, *, height: float = 2.4) -> tuple[Figure, list[Axes]]:
    """A figure with `n` panels in rows of up to five, each row `height` inches high."""
    rows = math.ceil(n / 5)
    columns = math.ceil(n / rows)
    figure = Figure((max(TEXT_WIDTH, columns * PANEL_WIDTH), rows * height + 0.5), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(n)]


def label_left(panels: Iterable[Axes], text: str) -> None:
    """Label the y axes of the panels that begin a row."""
    for axes in panels:
        if (place := axes.get_subplotspec()) and place.is_first_col():
            axes.set_ylabel(text)


@applied()
def caption(figure: Figure, text: str) -> None:
    """Add to the small print below the panels."""
    said = "; ".join(filter(None, (figure.get_supxlabel().replace("\n", " "), text)))
    fitting = int(figure.get_figwidth() * CHARACTERS_PER_INCH)
    figure.supxlabel(textwrap.fill(said, fitting), fontsize=6.5, color="#555555")


def legend(figure: Figure, looks: Sequence[Look]) -> None:
    """Add one legend for all panels, above them, in row order; rows beyond the first make the figure higher.

    Each look has a `label`.
    """
    handles = [Line2D([], [], **look) for look in looks]
    widths = sorted((0.55 + 0.05 * len(str(handle.get_label())) for handle in handles), reverse=True)
    fitting = next((n for n in range(len(widths), 1, -1) if sum(widths[:n]) <= figure.get_figwidth()), 1)
    rows = max(math.ceil(len(widths) / fitting), 1)
    columns = max(math.ceil(len(widths) / rows), 1)
    figure.set_figheight(figure.get_figheight() + 0.17 * (rows - 1))
    by_column = [handle for i in range(columns) for handle in handles[i::columns]]  # as matplotlib fills a legend
    figure.legend(handles=by_column, loc="outside upper center", ncols=columns)


def curve_legend(figure: Figure, looks: Mapping[Curve, Look]) -> None:
    """Add a legend of curves."""
    legend(figure, [changed(look, label=label(curve)) for curve, look in looks.items()])


def flagged_minima(fits: Mapping[str, Any]) -> set[tuple[float, Curve]]:
    """Budget and curve of each fitted minimum that is flagged; figures draw what is computed from it hollow."""
    return {(e["budget"], m["name"]) for e in fits["budgets"] for m in e["methods"] if m["status"] != OptimumStatus.OK}


def compares_flagged(flagged: set[tuple[float, Curve]], budget: float, one: Mapping[str, Any]) -> bool:
    """Whether a difference or multiplier of `fits.json` at this budget compares one of the `flagged_minima`."""
    return not flagged.isdisjoint({(budget, one["method"]), (budget, one["reference"])})


def star(axes: Axes, x: float, y: float, color: str, label: str, *, hollow: bool = False) -> None:
    """Mark a minimum with a star; hollow if it is flagged."""
    face, edge, width = ("white", color, 0.9) if hollow else (color, "white", 0.6)
    axes.plot(
        [x], [y], "*", markersize=10, color=color, zorder=5, label=label,
        markerfacecolor=face, markeredgecolor=edge, markeredgewidth=width,
    )  # fmt: skip


def points(
    axes: Axes, x: Any, y: Any, *, color: str, label: str, marker: str = "o", linestyle: Any = "none",
    bars: tuple[Any, Any] | None = None, hollow: Any = False, zorder: float = 3.0, markersize: float = 5.0,
    linewidth: float = 0.9,
) -> None:  # fmt: skip
    """Marks, white inside where `hollow`, with bars between two heights, and a line through all of them."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    errors = None if bars is None else np.abs([np.asarray(end, float) - y for end in bars])
    axes.errorbar(
        x, y, errors, fmt=marker, color=color, label=label, zorder=zorder,
        linestyle=linestyle, linewidth=linewidth, elinewidth=0.7, markersize=markersize, markeredgecolor="white",
        markeredgewidth=0.5,
    )  # fmt: skip
    white = np.broadcast_to(np.asarray(hollow, bool), y.shape)
    look = {"color": color, "markerfacecolor": "white", "markersize": 0.9 * markersize, "zorder": zorder + 0.1}
    axes.plot(x[white], y[white], marker, label=f"_hollow {label}", **look)


def points_panel(axes: Axes, table: pd.DataFrame, looks: Mapping[Any, Look], *, apart: float = 1.0) -> None:
    """A line of points per series over a logarithmic x axis.

    Args:
        axes: where to draw.
        table: series, x, y; and, if they are known, the ends `low` and `high` of intervals, and what is `hollow`.
        looks: of each series that may be there.
        apart: factor between the x values of neighbouring series, so that their intervals do not cover each other.
    """
    axes.set_xscale("log")
    shown = [series for series in looks if series in {*table["series"]}]
    for i, series in enumerate(shown):
        rows = table[table["series"] == series].sort_values("x")
        bars = (rows["low"], rows["high"]) if "low" in rows else None
        x, hollow = rows["x"] * apart ** (i - (len(shown) - 1) / 2), rows.get("hollow", False)
        points(axes, x, rows["y"], bars=bars, hollow=hollow, **changed({"label": str(series)}, **looks[series]))


def listed(column: pd.Series) -> str:
    """The values of a column as text for captions."""
    values = sorted(column.dropna().unique())
    return " and ".join(value if isinstance(value, str) else f"{value:,.0f}" for value in values)


def log_axis(axis: Axis, low: float, high: float) -> None:
    """Set ticks of a logarithmic axis with plain labels (`200k`, `3M`), even if its range is short."""
    decades = math.log10(high / low)
    axis.set_minor_formatter(ticker.NullFormatter())
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: short_number(value)))
    if decades < 0.7:
        nbins = 4 if isinstance(axis, XAxis) else 6
        axis.set_major_locator(ticker.MaxNLocator(nbins=nbins, steps=[1, 2, 2.5, 5, 10]))
        axis.set_minor_locator(ticker.NullLocator())
    else:
        subs = (1.0, 2.0, 5.0) if decades < 1.4 else (1.0, 3.0) if decades < 2.5 else (1.0,)
        axis.set_major_locator(ticker.LogLocator(subs=subs))


def decade_axis(axis: Axis, values: Iterable[float] = (), text: Callable[[float], str] = power_of_ten) -> None:
    """Set ticks of a logarithmic axis at 1 and 3 times powers of ten, or at the values themselves if they are few."""
    ticks = sorted(set(values))
    few = 0 < len(ticks) <= 4
    axis.set_major_locator(ticker.FixedLocator(ticks) if few else ticker.LogLocator(subs=(1.0, 3.0)))
    if few:
        axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: text(value)))
    axis.set_minor_formatter(ticker.NullFormatter())


def short_number(value: float) -> str:
    """`1500` -> `1.5k`, `2e6` -> `2M`, `1e9` -> `1G`."""
    return f"{value:g}" if value < 1000 else ticker.EngFormatter(sep="").format_eng(value)


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write `<stem>.png` and `<stem>.pdf` atomically; the same figure gives the same bytes."""
    paths = {kind: stem.with_name(f"{stem.name}.{kind}") for kind in NO_METADATA}
    for kind, path in paths.items():
        with replacing(path) as temporary, applied():
            figure.savefig(temporary, format=kind, metadata=NO_METADATA[kind])
    return [*paths.values()]
