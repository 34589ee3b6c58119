"""The standing table as Markdown, and its figure: a dot with its interval for every row."""

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from peerscale.figures import style
from peerscale.figures.markdown import number, table, with_interval
from peerscale.plan.cell_names import budget_name

COLOUR = "#333333"
LEGEND = """\
- **rank**: rows that have none in common differ significantly, by Holm's test of all pairs at 5 %
- **multiplier**: takes the reference's losses as exact
- **time**: of training, over the reference's
- **loss**: mean over the sizes, of three seeds each; the reference was trained at two more sizes
- **parameters**: of the whole model at the middle size
- **version**: commits that trained it; +: with uncommitted changes""".splitlines()


def standing_table(rows: pd.DataFrame, reference: str) -> str:
    """Markdown of the standing table."""
    head = f"Losses minus those of `{reference}` at equal FLOPs per token, in nats per token"
    lines = [
        "# The standing table",
        "",
        f"{head}; how: [protocol](../../docs/standing-table.md).",
        "",
        *LEGEND,
        "",
    ]
    for budget, at in rows.groupby("budget", sort=False):
        lines += [
            f"## {budget_name(float(str(budget)))} FLOPs",
            "",
            *table([_row(row) for row in at.to_dict("records")]),
            "",
        ]
    return "\n".join(lines)


def _row(row: Mapping[Any, Any]) -> dict[str, str]:
    runs = f"{row['sizes']} x {row['seeds']}" + f", {row['failed']} failed" * bool(row["failed"])
    difference = with_interval(row["difference"], (row["low"], row["high"]), "{:+.3f}")
    return {
        "rank": row["rank"] or "—", "entrant": f"[{row['entrant']}]({row['entrant']}/entrant.json)",
        "multiplier in FLOPs [95 %]": _multiplier(row),
        "difference [95 %]": "0" if row["se"] == 0 else difference,
        "smallest effect that could be told": number(row["smallest"], "{:.3f}"),
        "time at equal FLOPs": number(row["time"], "{:.2f}"), "loss": number(row["loss"], "{:.4f}"),
        "active parameters": f"{row['params_active']:,}",
        "total": f"{row['params_total']:,}", "sizes x seeds": runs,
        "runs to tune": str(row["trials"]), "mark": row["mark"],
        **{key: row[key] for key in ("date", "version", "protocol")},
    }  # fmt: skip


def _multiplier(row: Mapping[Any, Any]) -> str:
    """A multiplier with its interval; a bound where the reference was not trained far enough."""
    if row["se"] == 0 or math.isnan(row["difference"]):
        return number(row["multiplier"], "{:g}")
    bounds = {0.0: f"< {row['multiplier_least']:.3g}", math.inf: f"> {row['multiplier_most']:.3g}"}
    each = [row[key] for key in ("multiplier", "multiplier_low", "multiplier_high")]
    value, low, high = (bounds.get(one) or number(one) for one in each)
    return f"{value} [{low}, {high}]"


@style.applied()
def standing_figure(rows: pd.DataFrame) -> Figure:
    """One panel per budget: the difference of every entrant to the reference with its 95 % interval."""
    budgets = rows.groupby("budget", sort=False)
    each = [*budgets.size()]
    figure = Figure((style.TEXT_WIDTH, 0.8 * len(each) + 0.2 * sum(each)), layout="constrained")
    panels = figure.subplots(len(each), sharex=True, squeeze=False, height_ratios=each)[:, 0]
    for axes, (budget, at) in zip(panels, budgets, strict=True):
        for y, row in enumerate(at.to_dict("records")):
            errors = [[row["difference"] - row["low"]], [row["high"] - row["difference"]]]
            hollow = row["mark"] not in ("", "reference")
            axes.errorbar(row["difference"], y, xerr=errors, fmt="o", color=COLOUR, markersize=4, linewidth=1,
                          markerfacecolor="white" if hollow else COLOUR)  # fmt: skip
        axes.axvline(0, color=COLOUR, linewidth=0.7)
        axes.set_title(style.budget_title(float(str(budget))))
        axes.set_yticks(range(len(at)), [*at["entrant"]])
        axes.set_ylim(len(at) - 0.5, -0.5)
    (reference,) = {*rows.loc[rows["mark"] == "reference", "entrant"]}
    panels[-1].set_xlabel(f"loss minus that of {reference} (nats per token)")
    hollow = "; hollow: rows that have a mark in the table, such as controls"
    style.caption(figure, "bars: 95 %" + hollow * bool({*rows["mark"]} - {"", "reference"}))
    return figure
