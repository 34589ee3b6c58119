"""Tables in Markdown: tables 1 and 2 of the paper, errors by source, multipliers, exponents, other conventions."""

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from peerscale.cell_names import budget_name
from peerscale.laws.optima import OptimumStatus
from peerscale.runs.study import same_variant, usable
from peerscale.viz.ablations import with_norm
from peerscale.viz.published import WITHOUT_NORM, paper_values
from peerscale.viz.style import in_words, label, ordered, size_label

Fits = Mapping[str, Any]
"""A study's `fits.json`."""

METRICS = {"ppl": "ppl_c4", "expert_usage": "expert_usage", "unevenness": "unevenness"}
"""Columns of table 2, and their names in the paper's."""
FORMS = {"ppl": "{:.2f}", "expert_usage": "{:.1%}", "unevenness": "{:.2f}"}


def perplexities(fits: Fits, val_set: str) -> pd.DataFrame:
    """Table 1: perplexity on each evaluation set at the compute optimum of the validation loss.

    Returns:
        budget, name, a column per set, gap (nats per token to dense on the validation set), flagged.
    """
    rows = [
        {"budget": entry["budget"], "name": m["name"], **{name: np.exp(loss) for name, loss in m["sets"].items()},
         "flagged": m["status"] != OptimumStatus.OK}
        for entry in fits["budgets"] for m in entry["methods"] if m["sets"]
    ]  # fmt: skip
    if not rows:
        return pd.DataFrame(columns=["budget", "name", "gap", "flagged"])
    return with_gap(pd.DataFrame(rows), val_set)


def paper_perplexities(published: pd.DataFrame) -> pd.DataFrame:
    """The paper's table 1 in the same form; its gap is on C4."""
    wide = published[published["item"] == "table 1"].pivot(index=["x", "method"], columns="metric", values="value")
    wide.columns = [column.removeprefix("ppl_") for column in wide.columns]
    wide = wide.reset_index().rename(columns={"x": "budget", "method": "name"})
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
    return name if name.partition(" ")[0] == "dense" else same_variant("dense", name, list(names))


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


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Lines of a table."""
    head = list(header)
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def perplexity_lines(table: pd.DataFrame) -> list[str]:
    """Table 1, ours or the paper's, in Markdown."""
    sets = [column for column in table.columns if column not in ("budget", "name", "gap", "flagged")]
    texts = [table[name].map(number) for name in sets] + [table["gap"].map(lambda gap: number(gap, "{:+.3f}"))]
    return markdown(["budget", "method", *sets, "difference to dense (nats)"], zip(*_who(table), *texts, strict=True))


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
    names = ("perplexity", "experts used", "unevenness")
    return markdown(["experts", *names, *(f"paper: {name}" for name in names)], rows)


def exponent_lines(fits: Fits) -> list[str]:
    """Exponents of the optimal FLOPs per token by approaches 1, 2 and 3, and the largest budget held out; in Markdown.

    Empty where no method has the three budgets of a power law.
    """
    laws, rows = fits["laws"], []
    for name in ordered(fit["method"] for fit in laws.values()):
        envelope, isoflop, surface = (laws.get(name + end, {}) for end in ("/envelope", "", "/parametric"))
        if isoflop.get("exponent") is None and not surface:
            continue
        texts = [with_interval(fit.get(key), fit.get("ci", {}).get(key), "{:.3f}")
                 for fit, key in ((envelope, "exponent"), (isoflop, "exponent"), (surface, "a"))]  # fmt: skip
        held = surface.get("hold_out") or {}
        rows.append([
            label(name), *texts, with_interval(held.get("predicted"), held.get("interval"), "{:.3f}"),
            number(held.get("observed"), "{:.3f}"),
        ])  # fmt: skip
    header = ("method", "1: curves", "2: isoFLOP optima", "3: surface", "largest budget: predicted", "observed")
    return markdown(header, rows) if rows else []


def convention_lines(fits: Fits) -> list[str]:
    """Multipliers under other conventions of counting FLOPs, with ranks, in Markdown; empty without any.

    Ranks are among the methods at one budget that are compared with the same dense curve.
    """
    curves = {m["name"] for entry in fits["budgets"] for m in entry["methods"]}
    groups: dict[tuple[float, str], dict[str, Mapping[str, float | None]]] = {}
    for found in fits["conventions"]:
        dense = dense_of(found["method"], curves) or "dense"
        group = groups.setdefault((found["budget"], dense), {dense: dict.fromkeys(found["multipliers"], 1.0)})
        group[found["method"]] = found["multipliers"]
    rows = []
    for budget, dense in sorted(groups, key=lambda key: key[0]):
        group = groups[budget, dense]
        for name, multipliers in group.items():
            texts = [_ranked(value, [other[c] for other in group.values()]) for c, value in multipliers.items()]
            rows.append([budget_name(budget), label(name), *texts])
    return markdown(["budget", "method", *fits["conventions"][0]["multipliers"]], rows) if rows else []


def _ranked(value: float | None, among: Iterable[float | None]) -> str:
    """A multiplier with its rank."""
    return "—" if value is None else f"{value:.3f} ({1 + sum(other is not None and other > value for other in among)})"


def parts_lines(fits: Fits, reference: str = "dense") -> list[str]:
    """Each difference to `reference` with its 95 % interval and the parts of its standard error, in Markdown."""
    rows = []
    for entry in fits["budgets"]:
        for found in entry["differences"]:
            if found["reference"].partition(" ")[0] != reference or found.get("value") is None:
                continue
            parts = [number(found[key], "{:.4f}") for key in ("fit_se", "seeds_se", "sequences_se", "rate_se", "se")]
            own = found.get("own")
            rows.append([
                budget_name(entry["budget"]), label(found["method"]), signed_interval(found), *parts,
                number(found["df"], "{:.0f}") if found["df"] else "∞",
                f"{number(own['value'], '{:+.3f}')} ± {number(own['se'], '{:.3f}')}" if own else "—",
            ])  # fmt: skip
    header = ("budget", "method", f"difference to {reference} [95 %]", "s.e. from sizes", "s.e. from seeds",
              "s.e. from sequences", "s.e. from learning rates", "s.e., all", "degrees of freedom",
              "difference with own curvatures ± s.e.")  # fmt: skip
    return markdown(header, rows) if rows else []


def multiplier_lines(fits: Fits) -> list[str]:
    """Compute multipliers in Markdown; empty without any."""
    rows = [
        [budget_name(m["budget"]), label(m["method"]),
         with_interval(m["multiplier"], (m["low"], m["high"]), "{:.2f}")]
        for m in sorted(fits["multipliers"], key=lambda m: m["budget"])
    ]  # fmt: skip
    return markdown(["budget", "method", "compute multiplier [95 %]"], rows) if rows else []


def claim_lines(fits: Fits) -> list[str]:
    """Each comparison of the family with its probability, in Markdown; empty without any."""
    rows = []
    for claim in fits["claims"]:
        (method, _, settings), (rival, _, others) = (claim[key].partition(" ") for key in ("method", "rival"))
        pair = f"{label(method)} minus {label(rival)}" if settings == others else ""
        texts = [pair or f"{label(claim['method'])} minus {label(claim['rival'])}", size_label(claim["size"]),
                 in_words(settings) if pair else ""]  # fmt: skip
        rows.append([budget_name(claim["budget"]), ", ".join(filter(None, texts)), signed_interval(claim),
                     probability(claim["p"]), probability(claim["p_holm"])])  # fmt: skip
    header = ("budget", "comparison", "difference [95 %]", "p", "p, corrected for the family")
    return markdown(header, rows) if rows else []


def probability(p: float | None) -> str:
    """Four decimals, or `< 0.0001`."""
    return "< 0.0001" if p is not None and p < 1e-4 else number(p, "{:.4f}")


def signed_interval(found: Mapping[str, Any]) -> str:
    """A difference with its interval: `−0.033 [−0.049, −0.018]`."""
    return with_interval(found["value"], (found["low"], found["high"]), "{:+.3f}")


def _who(table: pd.DataFrame) -> tuple[list[str], list[str]]:
    """Budgets and methods; a dagger where the minimum is flagged."""
    flagged = table["flagged"] if "flagged" in table else [False] * len(table)
    names = [label(name) + " †" * bool(flag) for name, flag in zip(table["name"], flagged, strict=True)]
    return [budget_name(budget) for budget in table["budget"]], names


def with_interval(value: float | None, interval: Sequence[float | None] | None, form: str = "{:.4g}") -> str:
    """A number with its interval in brackets, which say so if there is none."""
    if value is None:
        return "—"
    known = interval is not None and None not in interval
    return number(value, form) + (f" [{', '.join(number(end, form) for end in interval)}]" if known else " [none]")


def number(value: float | None, form: str = "{:.2f}") -> str:
    """A dash where there is none; 1.2e6 for 1.2e+06."""
    return "—" if pd.isna(value) else form.format(value).replace("e+", "e").replace("e0", "e").replace("-", "−")
