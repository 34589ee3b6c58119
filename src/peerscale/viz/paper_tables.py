"""Tables 1 and 2 of the PEER paper, ours and theirs in one form."""

import itertools
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import pandas as pd

from peerscale.cell_names import budget_name
from peerscale.laws.optima import OptimumStatus
from peerscale.runs.study import same_variant, usable
from peerscale.viz.ablations import with_norm
from peerscale.viz.differences import is_dense
from peerscale.viz.markdown import number
from peerscale.viz.published import WITHOUT_NORM, paper_values
from peerscale.viz.style import label, ordered

METRICS = {"ppl": "ppl_c4", "expert_usage": "expert_usage", "unevenness": "unevenness"}
"""Columns of table 2, and their names in the paper's."""
FORMS = {"ppl": "{:.2f}", "expert_usage": "{:.1%}", "unevenness": "{:.2f}"}


def perplexities(fits: Mapping[str, Any], val_set: str) -> pd.DataFrame:
    """Table 1: perplexity on each evaluation set at the compute optimum of the validation loss.

    Returns:
        budget, name, a column per set, flagged, gap (nats per token to dense on the validation set).
    """
    rows = [
        {"budget": entry["budget"], "name": m["name"], **{name: np.exp(loss) for name, loss in m["sets"].items()},
         "flagged": m["status"] != OptimumStatus.OK}
        for entry in fits["budgets"] for m in entry["methods"] if m["sets"]
    ]  # fmt: skip
    return with_gap(pd.DataFrame(rows), val_set) if rows else pd.DataFrame()


def paper_perplexities(published: pd.DataFrame) -> pd.DataFrame:
    """The paper's table 1 in the same form; its gap is on C4."""
    wide = published[published["item"] == "table 1"].pivot(index=["x", "method"], columns="metric", values="value")
    wide.columns = [column.removeprefix("ppl_") for column in wide.columns]
    wide = wide.reset_index().rename(columns={"x": "budget", "method": "name"}).assign(flagged=False)
    order = {name: i for i, name in enumerate(ordered(wide["name"]))}
    return with_gap(wide.sort_values(["budget", "name"], key=lambda c: c.map(order).fillna(c)), "c4")


def with_gap(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """The table with each row's distance to dense at its budget, nats per token, by the perplexity in `column`.

    A variant's distance is that to dense at its own settings, if there is one.
    """
    keys, names = list(zip(table["budget"], table["name"], strict=True)), set(table["name"])
    losses = dict(zip(keys, np.log(table[column].astype(float)), strict=True))
    dense = [losses.get((budget, dense_of(name, names)), np.nan) for budget, name in keys]
    return table.assign(gap=[losses[key] - reference for key, reference in zip(keys, dense, strict=True)])


def dense_of(name: str, names: Collection[str]) -> str | None:
    """The dense curve that a curve is compared with, itself if it is dense; None if there is none."""
    return name if is_dense(name) else same_variant("dense", name, list(names))


def perplexity_rows(table: pd.DataFrame) -> list[dict[str, str]]:
    """Table 1, ours or the paper's, in words; a dagger where the minimum is flagged."""
    sets = [column for column in table.columns if column not in ("budget", "name", "gap", "flagged")]
    return [
        {"budget": budget_name(row["budget"]), "method": label(row["name"]) + " †" * bool(row["flagged"]),
         **{name: number(row[name]) for name in sets}, "difference to dense (nats)": number(row["gap"], "{:+.3f}")}
        for row in table.to_dict("records")
    ]  # fmt: skip


def experts_by_norm(runs: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """Table 2: perplexity, use of experts and unevenness by number of experts, without and with query BatchNorm.

    Returns:
        source (ours, paper), n_experts, norm, ppl, expert_usage, unevenness. Ours are means over seeds, of the
        logarithm for the perplexity.
    """
    cells = runs[usable(runs) & (runs["method"] == "peer")]
    cells = cells.assign(norm=with_norm(cells), ppl=cells["val_loss"]).astype(dict.fromkeys(METRICS, float))
    ours = cells.groupby(["n_experts", "norm"], as_index=False)[list(METRICS)].mean().assign(source="ours")
    ours["ppl"] = np.exp(ours["ppl"])
    paper = [
        {"n_experts": n, "norm": norm, metric: value, "source": "paper"}
        for norm, method in ((False, WITHOUT_NORM), (True, "peer"))
        for metric, name in METRICS.items()
        for n, value in paper_values(published, "table 2", method, name).items()
    ]
    by = ["n_experts", "norm", "source"]
    return pd.concat([ours, pd.DataFrame(paper).groupby(by, as_index=False).first()], ignore_index=True)


def norm_rows(table: pd.DataFrame) -> list[dict[str, str]]:
    """Table 2 in words: a row per number of experts; pairs read without / with BatchNorm."""
    wide = table.pivot(index="n_experts", columns=["source", "norm"], values=list(METRICS))
    names = {"ppl": "perplexity", "expert_usage": "experts used", "unevenness": "unevenness"}
    rows = []
    for n, values in wide.iterrows():
        row = {"experts": f"{n:,.0f}"}
        for source, (metric, form) in itertools.product(("ours", "paper"), FORMS.items()):
            pair = [number(values.get((metric, source, norm)), form) for norm in (False, True)]
            title = names[metric] if source == "ours" else f"paper: {names[metric]}"
            row[title] = "—" if set(pair) == {"—"} else " / ".join(pair)
        rows.append(row)
    return rows
