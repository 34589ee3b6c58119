"""Tables 1 and 2 of the PEER paper, with our numbers and the paper's in the same form."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from peerscale.figures.ablations import with_norm
from peerscale.figures.differences import to_dense
from peerscale.figures.markdown import number
from peerscale.figures.published import WITHOUT_NORM, paper_values
from peerscale.figures.style import label, ordered
from peerscale.plan.cell_names import budget_name
from peerscale.stats.curves_of_runs import is_dense, method_names, usable
from peerscale.stats.optima import OptimumStatus

METRICS = {
    "ppl": ("perplexity", "ppl_c4", "{:.2f}"),
    "expert_usage": ("experts used", "expert_usage", "{:.1%}"),
    "unevenness": ("unevenness", "unevenness", "{:.2f}"),
}
"""Columns of table 2: heading, name in `he2024.csv`, and format."""


def perplexities(fits: Mapping[str, Any]) -> list[dict[str, str]]:
    """Table 1: perplexity on each evaluation set at the compute optimum of the validation loss, and the difference to
    dense.

    A dagger marks a flagged minimum.
    """
    gaps = {(budget, name): found.get("value") for (budget, size, name), found in to_dense(fits).items() if not size}
    sets = dict.fromkeys(name for entry in fits["budgets"] for m in entry["methods"] for name in m["sets"])
    return [
        perplexity_row(
            entry["budget"], label(m["name"]) + " †" * (m["status"] != OptimumStatus.OK),
            {name: np.exp(m["sets"].get(name, np.nan)) for name in sets},
            gaps.get((entry["budget"], m["name"]), 0.0 if is_dense(m["name"]) else None),
        )
        for entry in fits["budgets"] for m in entry["methods"] if m["sets"]
    ]  # fmt: skip


def paper_perplexities(published: pd.DataFrame) -> list[dict[str, str]]:
    """The paper's table 1 in the same form; the difference to dense is on C4."""
    rows = published[published["item"] == "table 1"].assign(set=published["metric"].str.removeprefix("ppl_"))
    wide = rows.pivot(index=["x", "method"], columns="set", values="value")
    found = []
    for budget in wide.index.unique("x"):
        at, losses = wide.loc[budget], np.log(wide.loc[budget, "c4"])
        gaps = losses - losses["dense"]
        found += [perplexity_row(budget, label(name), dict(at.loc[name]), gaps[name]) for name in ordered(at.index)]
    return found


def perplexity_row(budget: float, method: str, sets: Mapping[str, float], gap: float | None) -> dict[str, str]:
    """A row of table 1, ours or the paper's, as text; `gap` in nats per token."""
    shown = {name: number(value) for name, value in sets.items()}
    gap_title = "difference to dense (nats)"
    return {"budget": budget_name(budget), "method": method, **shown, gap_title: number(gap, "{:+.3f}")}


def norm_rows(runs: pd.DataFrame, published: pd.DataFrame) -> list[dict[str, str]]:
    """Table 2: one row per number of experts; pairs are without / with BatchNorm on the queries.

    Our numbers are means over seeds (for perplexity, of its logarithm); the paper's are beside them. All other settings
    are those of the study's first cell.
    """
    cells = runs[usable(runs) & (runs["method"] == "peer")]
    names = method_names(cells, without=("ffn.n_experts", "ffn.query_norm"))
    cells = cells[names.isin(names[:1])]
    cells = cells.assign(norm=with_norm(cells), ppl=cells["val_loss"]).astype(dict.fromkeys(METRICS, float))
    means = cells.groupby(["norm", "n_experts"], as_index=False)[list(METRICS)].mean()
    means["ppl"] = np.exp(means["ppl"])
    columns: dict[str, tuple[str, list[dict[float, float]]]] = {}
    for metric, (title, _, form) in METRICS.items():
        of_norm = [means[means["norm"] == norm].set_index("n_experts")[metric] for norm in (False, True)]
        columns[title] = form, [values.to_dict() for values in of_norm]
    for title, theirs, form in METRICS.values():
        pair = [paper_values(published, "table 2", method, theirs) for method in (WITHOUT_NORM, "peer")]
        columns[f"paper: {title}"] = form, pair
    rows = []
    for n in sorted({n for _, pair in columns.values() for values in pair for n in values}):
        row = {"experts": f"{n:,.0f}"}
        for title, (form, pair) in columns.items():
            texts = [number(values.get(n), form) for values in pair]
            row[title] = "—" if set(texts) == {"—"} else " / ".join(texts)
        rows.append(row)
    return rows
