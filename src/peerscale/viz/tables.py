"""Tables 1 and 2 of the paper, and rankings under other FLOP conventions, from the table of runs."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from peerscale.laws.isoflop import VertexStatus
from peerscale.laws.multiplier import compute_to_reach
from peerscale.runs.study import method_names, usable
from peerscale.viz.ablations import with_norm
from peerscale.viz.published import WITHOUT_NORM, paper_values
from peerscale.viz.style import label, ordered

Fits = Mapping[str, Mapping[str, Any]]

ROUTER = ("flops_router", "flops_query", "flops_sub_keys")
"""Components that choose experts."""

METRICS = {"ppl": "ppl_c4", "expert_usage": "expert_usage", "unevenness": "unevenness"}
"""Columns of table 2, and their names in the paper's."""
FORMS = {"ppl": "{:.2f}", "expert_usage": "{:.1%}", "unevenness": "{:.2f}"}


def optima(runs: pd.DataFrame, fits: Fits) -> list[tuple[str, float, Mapping[str, Any], pd.DataFrame]]:
    """Name, budget, minimum over FLOPs per token and the rows fitted, wherever there is a minimum; by budget."""
    named = runs.assign(name=method_names(runs))[usable(runs)]
    found = []
    for budget, at_budget in named.groupby("budget"):
        for name in ordered(at_budget["name"]):
            vertices = fits[name]["vertices"] if name in fits else ()
            for vertex in vertices:
                if vertex["budget"] == budget and vertex["x"] is not None:
                    rows = at_budget[(at_budget["name"] == name) & at_budget["flops_per_token"].isin(vertex["sizes"])]
                    found.append((name, float(str(budget)), vertex, rows))
    return found


def perplexities(runs: pd.DataFrame, fits: Fits) -> pd.DataFrame:
    """Table 1: perplexity on each evaluation set at the compute optimum.

    The optimum is the validation loss's minimum over FLOPs per token. Each set's loss there is that of a parabola
    through the method's sizes, as the validation loss's is.

    Returns:
        budget, name, a column per set, gap (nats per token to dense on the validation set), flagged.
    """
    val_set = str(runs["val_set"].iloc[0])
    rows = []
    for name, budget, vertex, cells in optima(runs, fits):
        sets = {}
        for column in (c for c in runs.columns if c.startswith("ppl_")):
            known = cells[cells[column].notna()]
            if known["flops_per_token"].nunique() >= 3:
                z = np.log10(known["flops_per_token"] / vertex["x"])
                sets[column.removeprefix("ppl_")] = float(np.exp(np.polyfit(z, np.log(known[column]), 2)[-1]))
        rows.append({"budget": budget, "name": name, **sets, "flagged": vertex["status"] != VertexStatus.OK})
    return with_gap(pd.DataFrame(rows), val_set) if rows else pd.DataFrame(columns=["budget", "name", "gap", "flagged"])


def paper_perplexities(published: pd.DataFrame) -> pd.DataFrame:
    """The paper's table 1 in the same form; its gap is on C4."""
    wide = published[published["item"] == "table 1"].pivot(index=["x", "method"], columns="metric", values="value")
    wide.columns = [column.removeprefix("ppl_") for column in wide.columns]
    wide = wide.reset_index().rename(columns={"x": "budget", "method": "name"})
    order = {name: i for i, name in enumerate(ordered(wide["name"]))}
    return with_gap(wide.sort_values(["budget", "name"], key=lambda c: c.map(order).fillna(c)), "c4")


def with_gap(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """The table with each row's distance to dense at its budget, nats per token, by the perplexity in `column`."""
    dense = table[table["name"] == "dense"].set_index("budget")[column]
    return table.assign(gap=np.log(table[column]) - np.log(table["budget"].map(dense)))


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


def conventions(runs: pd.DataFrame) -> dict[str, pd.Series]:
    """Training FLOPs per token of every row under other conventions, from the table's columns.

    `as counted` is the study's own. 6N counts 6 for each parameter and leaves out attention scores; the embedding,
    tied to the output head, is counted once. A causal kernel does half of the attention scores and values. Without
    router leaves out what chooses the experts.
    """
    counted = runs["flops_per_token"].astype(float)
    return {
        "as counted": counted,
        "6 x active parameters": 6.0 * runs["params_active"],
        "6 x total parameters": 6.0 * runs["params_total"],
        "causal attention": counted - (runs["flops_attention_scores"] + runs["flops_attention_values"]) / 2,
        "without router": counted - runs[[column for column in ROUTER if column in runs]].sum(axis=1),
    }


def multipliers_by_convention(runs: pd.DataFrame, fits: Fits) -> pd.DataFrame:
    """How many times a method's compute dense needs for its loss, with compute counted by each convention.

    Losses and sizes at the optimum are those of the study's own budgets; only what they cost is counted anew, by the
    convention's share at the optimal FLOPs per token (log-linear between the trained sizes). A ranking at equal
    compute is the ranking of these multipliers.

    Returns:
        budget, name, flagged and a column per convention; NaN with fewer than two unflagged budgets of dense.
    """
    done = runs[usable(runs)]
    found = optima(runs, fits)
    rows = [(budget, name, vertex["status"] != VertexStatus.OK) for name, budget, vertex, _ in found]
    table = pd.DataFrame(rows, columns=["budget", "name", "flagged"])
    losses = np.array([vertex["loss"] for _, _, vertex, _ in found])
    frontier = [i for i, (_, name, flagged) in enumerate(rows) if name == "dense" and not flagged]
    for convention, flops in conventions(done).items():
        shares = flops / done["flops_per_token"]
        spent = [budget * _share(vertex["x"], cells, shares) for _, budget, vertex, cells in found]
        needed = [np.nan] * len(found)
        if len(frontier) >= 2:
            dense = np.array(spent)[frontier], losses[frontier]
            needed = [compute_to_reach(*dense, float(loss)) for loss in losses]
        table[convention] = [whole / own for whole, own in zip(needed, spent, strict=True)]
    return table


def _share(x: float, cells: pd.DataFrame, shares: pd.Series) -> float:
    known = shares[cells.index].groupby(cells["flops_per_token"]).mean()
    sizes, there = known.index.to_numpy(float), known.to_numpy(float)
    return float(np.exp(np.interp(np.log(x), np.log(sizes), np.log(there))))


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Lines of a table."""
    head = list(header)
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def perplexity_lines(table: pd.DataFrame) -> list[str]:
    """Table 1, ours or the paper's, in Markdown."""
    sets = [column for column in table.columns if column not in ("budget", "name", "gap", "flagged")]
    texts = [table[name].map(number) for name in sets] + [table["gap"].map(lambda gap: number(gap, "{:+.3f}"))]
    return markdown(["budget", "method", *sets, "nats to dense"], zip(*_who(table), *texts, strict=True))


def norm_lines(table: pd.DataFrame) -> list[str]:
    """Table 2 in Markdown: a row per number of experts; pairs read without / with BatchNorm."""
    wide = table.pivot(index="n_experts", columns=["source", "norm"], values=list(METRICS))
    rows = []
    for n, values in wide.iterrows():
        row = [f"{n:,.0f}"]
        for source, (metric, form) in itertools.product(("ours", "paper"), FORMS.items()):
            pair = [number(values.get((metric, source, norm)), form) for norm in (False, True)]
            row.append("—" if set(pair) == {"—"} else " / ".join(pair))
        rows.append(row)
    names = ("perplexity", "usage", "unevenness")
    return markdown(["experts", *names, *(f"paper: {name}" for name in names)], rows)


def exponent_lines(fits: Fits) -> list[str]:
    """Exponents of the optimal FLOPs per token by approaches 1, 2 and 3, and the largest budget held out; in Markdown.

    Empty where no method has the three budgets of a power law.
    """
    rows = []
    for name in ordered(fit["method"] for fit in fits.values()):
        envelope, isoflop, surface = (fits.get(name + end, {}) for end in ("/envelope", "", "/parametric"))
        if isoflop.get("exponent") is None and not surface:
            continue
        texts = [with_interval(fit.get(key), fit.get("ci", {}).get(key), "{:.3f}")
                 for fit, key in ((envelope, "exponent"), (isoflop, "exponent"), (surface, "a"))]  # fmt: skip
        held = surface.get("hold_out") or {}
        rows.append([
            label(name), *texts, with_interval(held.get("predicted"), held.get("interval"), "{:.3f}"),
            number(held.get("observed"), "{:.3f}"),
        ])  # fmt: skip
    header = ("method", "1: curves", "2: parabolas", "3: surface", "largest budget: predicted", "observed")
    return markdown(header, rows) if rows else []


def convention_lines(table: pd.DataFrame) -> list[str]:
    """Multipliers with the rank at their budget in Markdown."""
    names = [column for column in table.columns if column not in ("budget", "name", "flagged")]
    ranks = table.groupby("budget")[names].rank(ascending=False, method="min")
    texts = [
        [f"{x:.3f} ({rank:.0f})" if x > 0 else "—" for x, rank in zip(table[name], ranks[name], strict=True)]
        for name in names
    ]
    return markdown(["budget", "method", *names], zip(*_who(table), *texts, strict=True))


def _who(table: pd.DataFrame) -> tuple[list[str], list[str]]:
    """Budgets and methods; a dagger where the minimum is flagged."""
    flagged = table["flagged"] if "flagged" in table else [False] * len(table)
    names = [label(name) + " †" * bool(flag) for name, flag in zip(table["name"], flagged, strict=True)]
    return [f"{budget:.3g}".replace("e+", "e") for budget in table["budget"]], names


def with_interval(value: float | None, interval: Sequence[float | None] | None, form: str = "{:.4g}") -> str:
    """A number with its interval in brackets, which say so if there is none."""
    if value is None:
        return "—"
    known = interval is not None and None not in interval
    return number(value, form) + (f" [{', '.join(number(end, form) for end in interval)}]" if known else " [none]")


def number(value: float | None, form: str = "{:.2f}") -> str:
    """A dash where there is none; 1.2e6 for 1.2e+06."""
    return "—" if pd.isna(value) else form.format(value).replace("e+", "e").replace("e0", "e").replace("-", "−")
