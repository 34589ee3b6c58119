"""Tables 1 and 2 of the PEER paper, with our numbers and the paper's in the same form."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from peerscale.figures.ablations import with_norm
from peerscale.figures.differences import difference_column, to_baseline
from peerscale.figures.markdown import number
from peerscale.figures.published import DENSE, LAYER, WITHOUT_NORM, paper_values
from peerscale.figures.style import label, ordered
from peerscale.plan.cell_names import budget_name
from peerscale.stats.curve import Curve
from peerscale.stats.optima import OptimumStatus

METRICS = {
    "ppl": ("perplexity", "ppl_c4", "{:.2f}"),
    "expert_usage": ("experts used", "expert_usage", "{:.1%}"),
    "unevenness": ("unevenness", "unevenness", "{:.2f}"),
}
"""Columns of table 2: heading, name in `he2024.csv`, and format."""


def perplexities(fits: Mapping[str, Any]) -> list[dict[str, str]]:
    """Table 1: perplexity on each evaluation set at the compute optimum of the validation loss, and the difference to
    the baseline.

    A dagger marks a flagged minimum.
    """
    differences, heading = to_baseline(fits), f"{difference_column(fits)} (nats)"
    sets = dict.fromkeys(name for entry in fits["budgets"] for m in entry["methods"] for name in m["sets"])
    rows = []
    for entry in fits["budgets"]:
        for m in (each for each in entry["methods"] if each["sets"]):
            itself = {"value": 0.0} if m["name"].method == fits["baseline"] else {}
            gap = differences.get((entry["budget"], "", m["name"]), itself).get("value")
            shown = {name: np.exp(m["sets"].get(name, np.nan)) for name in sets}
            method = label(m["name"]) + " †" * (m["status"] != OptimumStatus.OK)
            rows.append(_row(entry["budget"], method, shown, heading, gap))
    return rows


def paper_perplexities(published: pd.DataFrame) -> list[dict[str, str]]:
    """The paper's table 1 in the same form; the difference to dense is on C4."""
    rows = published[published["item"] == "table 1"].assign(set=published["metric"].str.removeprefix("ppl_"))
    wide = rows.pivot(index=["x", "method"], columns="set", values="value")
    found = []
    for budget in wide.index.unique("x"):
        at = wide.loc[budget]
        gaps = np.log(at["c4"] / at.loc[DENSE, "c4"])
        for curve in ordered(map(Curve, at.index)):
            sets, heading = dict(at.loc[curve.method]), "difference to dense (nats)"
            found.append(_row(budget, label(curve), sets, heading, gaps[curve.method]))
    return found


def _row(budget: float, method: str, sets: Mapping[str, float], heading: str, gap: float | None) -> dict[str, str]:
    """A row of table 1, ours or the paper's, as text; `gap` in nats per token."""
    shown = {name: number(value) for name, value in sets.items()}
    return {"budget": budget_name(budget), "method": method, **shown, heading: number(gap, "{:+.3f}")}


def norm_rows(done: pd.DataFrame, published: pd.DataFrame) -> list[dict[str, str]]:
    """Table 2: one row per number of experts; pairs are without / with BatchNorm on the queries.

    Our numbers are means over seeds (for perplexity, of its logarithm); the paper's are beside them. All other settings
    are those of the first of `done`, the finished runs of the layer.
    """
    others = done["curve"].map(lambda curve: curve.without("ffn.n_experts", "ffn.query_norm"))
    cells = done[others == others.iloc[0]]
    cells = cells.assign(norm=with_norm(cells), ppl=cells["val_loss"]).astype(dict.fromkeys(METRICS, float))
    means = cells.groupby(["norm", "n_experts"], as_index=False)[list(METRICS)].mean()
    means["ppl"] = np.exp(means["ppl"])
    columns: dict[str, tuple[str, list[dict[float, float]]]] = {}
    for metric, (title, _, form) in METRICS.items():
        of_norm = [means[means["norm"] == norm].set_index("n_experts")[metric] for norm in (False, True)]
        columns[title] = form, [values.to_dict() for values in of_norm]
    for title, theirs, form in METRICS.values():
        pair = [paper_values(published, "table 2", method, theirs) for method in (WITHOUT_NORM, LAYER)]
        columns[f"paper: {title}"] = form, pair
    rows = []
    for n in sorted({n for _, pair in columns.values() for values in pair for n in values}):
        row = {"experts": f"{n:,.0f}"}
        for title, (form, pair) in columns.items():
            texts = [number(values.get(n), form) for values in pair]
            row[title] = "—" if set(texts) == {"—"} else " / ".join(texts)
        rows.append(row)
    return rows
