"""The best learning rates of each method, and the cost of other rates."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from peerscale.runs.rates import RATES, settings_table
from peerscale.viz import style
from peerscale.viz.isoflop import missing_note


def edges(rows: pd.DataFrame) -> list[str]:
    """Messages for the rates of one method whose best value is the smallest or largest that was tried."""
    best = rows.iloc[0]
    return [
        f"the best {rate}, {best[rate]:g}, is at the edge of its grid: extend it"
        for rate in RATES
        if rows[rate].nunique() > 1 and best[rate] in (rows[rate].min(), rows[rate].max())
    ]


def rates_panel(axes: Axes, settings: pd.DataFrame, *, rate: str, loss: str) -> None:
    """One line per method of `settings_table`: `loss` (of a size, or the mean) at each value of `rate`, lr or table_lr.

    The other rate is at its best; methods without this rate are left out. A star marks the lowest loss; it is hollow at
    an edge of the grid.
    """
    colours = style.colours(settings["name"])
    for name in style.ordered(settings["name"]):
        tried = settings[(settings["name"] == name) & (settings[rate] > 0)].groupby(rate)[loss].min()
        if len(tried) < 2:
            continue
        x, y = np.asarray(tried.index, float), np.asarray(tried, float)
        axes.plot(x, y, ".-", color=colours[name], markersize=4, linewidth=1, label=name)
        best = int(y.argmin())
        style.star(axes, x[best], y[best], colours[name], f"_best {name}", hollow=best in (0, len(y) - 1))
    axes.set_xscale("log")
    style.decade_axis(axes.xaxis, settings.loc[settings[rate] > 0, rate], "{:.4g}".format)


def rates_figure(runs: pd.DataFrame, *, note: str = "") -> Figure:
    """One panel per size over the common rate, and one over the table rate, with the mean over the sizes."""
    settings = settings_table(runs)
    sizes = sorted((c for c in settings.columns if c not in ("name", *RATES, "mean")), key=lambda s: (len(s), s))
    several = {rate: bool((settings.groupby("name")[rate].nunique() > 1).any()) for rate in RATES}
    panels_of = (
        [("lr", size, style.size_label(size)) for size in sizes] if several["lr"] or not several["table_lr"] else []
    )
    if several["table_lr"]:
        panels_of.append(("table_lr", "mean", "mean over sizes" if len(sizes) > 1 else style.size_label(sizes[0])))
    with style.applied():
        figure, panels = style.panels(len(panels_of))
        for axes, (rate, loss, title) in zip(panels, panels_of, strict=True):
            rates_panel(axes, settings, rate=rate, loss=loss)
            axes.set(title=title, xlabel="learning rate" if rate == "lr" else "rate of the expert tables")
        panels[0].set_ylabel("loss (nats per token)")
        names, counts, seeds = style.ordered(settings["name"]), settings["name"].value_counts(), runs["seed"].nunique()
        style.method_legend(figure, names)
        budgets = ", ".join(style.budget_title(budget) for budget in sorted(runs["budget"].unique()))
        other = "the other rate at its best; " if len({rate for rate, *_ in panels_of}) > 1 else ""
        about = f"{budgets}; {seeds} seed{'s' * (seeds > 1)}; {other}stars: lowest, hollow at the edge of the grid"
        each = ", ".join(f"{style.label(name)} {counts[name]}" for name in names)
        tried = f"settings tried: {f'{counts.iloc[0]} each' if counts.nunique() == 1 else each}"
        tried += "; rates are for the reference width"
        style.caption(figure, note, about, tried, missing_note(runs))
    return figure
