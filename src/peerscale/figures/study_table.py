"""The tables of a study, for its `table.md`; the study's axes decide which ones.

They are losses at the compute optimum with their errors, perplexities there (the paper's table 1), compute multipliers
and rankings under other FLOP conventions; or a layer's settings at one size, with the paper's table 2; or learning
rates. `docs/method.md` explains their columns.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from peerscale.figures.ablations import varied
from peerscale.figures.answer import outcome
from peerscale.figures.brackets import brackets_section
from peerscale.figures.differences import against_dense, to_dense
from peerscale.figures.isoflop import by_budget, status_counts
from peerscale.figures.markdown import Rows, number, probability, section, signed_interval, table, with_interval
from peerscale.figures.paper_tables import norm_rows, paper_perplexities, perplexities
from peerscale.figures.published import read_published
from peerscale.figures.rate_law import finished_cells, rate_law_sections
from peerscale.figures.style import in_words, label, listed, ordered, size_label
from peerscale.plan.cell_names import budget_name
from peerscale.stats.curves_of_runs import budgets_with_curves, method_names, same_variant, usable, without_brackets
from peerscale.stats.optima import OptimumStatus
from peerscale.stats.rates import tries_rates

Fits = Mapping[str, Any]
"""A study's `fits.json`."""

LAYER = {"n_experts": "experts", "ffn_heads": "heads", "top_k": "top k", "capacity_factor": "capacity factor"}
"""Columns of the settings of a layer."""

PARTS = {"fit_se": "s.e. from sizes", "seeds_se": "s.e. from seeds", "sequences_se": "s.e. from sequences",
         "rate_se": "s.e. from learning rates", "se": "s.e., all"}  # fmt: skip
"""Parts of the standard error of a difference."""


def study_table(sweep: str, runs: pd.DataFrame, fits: Fits, withdrawn: str = "") -> str:
    """`table.md` of a study from its table of runs, `fits.json` and, if its results are withdrawn, the reason."""
    runs = without_brackets(runs)
    runs = runs.assign(name=method_names(runs))
    if compares_curves(runs):
        title, lines = "losses at equal compute", [f"**{fits['answer']}**", "", *table(main_rows(runs, fits)), ""]
        lines += [f"Nats per token; FLOPs: {listed(runs['convention'])}.", "", *at_the_optimum(runs, fits)]
    elif tries_rates(runs):
        law = fits["rates"].get("law")
        title, lines = "learning rates", rate_law_sections(runs, law) if law else finished_cells(runs)
    else:
        title = f"settings at {'one size' if runs['size'].nunique() == 1 else 'several sizes'}"
        lines = [f"**{fits['answer']}**", "", *table(main_rows(runs, fits)), ""]
        lines += [f"Nats per token; FLOPs: {listed(runs['convention'])}.", "", *section("Claims", claims(fits))]
        lines += section("Differences", difference_rows(fits))
    changed, places = varied(runs[runs["method"] == "peer"]), runs[["size", "budget"]].drop_duplicates()
    if changed & {"n_experts", "query_norm"} and not changed & {"lr", "table_lr"} and len(places) == 1:
        title_of_paper = "Experts and BatchNorm on the queries (the paper's table 2)"
        lines += section(title_of_paper, norm_rows(runs, read_published()), "Pairs: without / with BatchNorm.")
    lines += brackets_section(fits)
    first = [f"**Withdrawn:** {withdrawn}", ""] if withdrawn else []
    return "\n".join([f"# {sweep}: {title}", "", *first, *lines])


def compares_curves(runs: pd.DataFrame) -> bool:
    """Whether a study compares methods over sizes rather than settings at one size."""
    return bool(budgets_with_curves(runs[usable(runs)])) or not varied(runs)


def main_rows(runs: pd.DataFrame, fits: Fits) -> Rows:
    """The first table of a study: optima, or a row per variant at each size. `runs` has a column `name`."""
    return optimum_rows(runs, fits) if compares_curves(runs) else settings_rows(runs, fits)


def optimum_rows(runs: pd.DataFrame, fits: Fits) -> Rows:
    """One row per budget and method: the compute optimum, and its difference to dense."""
    rows, optima, differences = [], by_budget(fits), to_dense(fits)
    for budget in sorted(runs["budget"].unique()):
        for name in ordered(runs.loc[runs["budget"] == budget, "name"]):
            mine = runs[(runs["budget"] == budget) & (runs["name"] == name)]
            found, finished = optima.get(budget, {}).get(name), mine.loc[usable(mine), "size"].nunique()
            flags = status_counts(mine[~usable(mine)])
            if found and found["status"] != OptimumStatus.OK:
                flags.append(found["status"].replace("_", " "))
            rows.append({
                "budget": budget_name(budget), "method": label(name),
                "sizes": f"{finished} finished, {len(found['sizes']) if found else 0} fitted",
                "optimal FLOPs per token": number(found and found["x"], "{:.3g}"),
                "loss there": number(found and found["loss"], "{:.4f}"),
                "loss with own curvature": number(found and found["own"]["loss"], "{:.4f}"),
                "difference to dense [95 %]": against_dense(differences, budget, "", name),
                "flags": "; ".join(flags) or "—",
            })  # fmt: skip
    return rows


def settings_rows(runs: pd.DataFrame, fits: Fits) -> Rows:
    """One row per variant and size, over its seeds."""
    done = runs[usable(runs)]
    plan = {column: list(done[column].unique()) for column in ("budget", "size", "name")}  # there settings ascend
    columns = ["val_loss", "layer_share", "expert_usage", "unevenness"]
    groups = done.astype(dict.fromkeys(columns, float)).groupby([*plan], as_index=False)
    variants = groups.agg(seeds=("seed", "size"), **{column: (column, "mean") for column in columns})
    variants = variants.sort_values([*plan], key=lambda column: column.map(plan[str(column.name)].index))
    differences = to_dense(fits)
    return [
        {
            "budget": budget_name(row["budget"]), "size": size_label(row["size"]), "method": label(row["name"]),
            "seeds": str(row["seeds"]), "loss": number(row["val_loss"], "{:.4f}"),
            "perplexity": number(np.exp(row["val_loss"])),
            "difference to dense [95 %]": against_dense(differences, row["budget"], row["size"], row["name"]),
            "layer's share of FLOPs": number(row["layer_share"], "{:.1%}"),
            "experts used": number(row["expert_usage"], "{:.1%}"), "unevenness": number(row["unevenness"]),
        }
        for row in variants.to_dict("records")
    ]  # fmt: skip


def at_the_optimum(runs: pd.DataFrame, fits: Fits) -> list[str]:
    """The sections of a study of optima; those without rows are left out."""
    ours, growth = perplexities(fits), [
        {"method": label(one["method"]), "slope": with_interval(one["slope"], (one["low"], one["high"]), "{:+.3f}")}
        for one in fits["growth"]
    ]  # fmt: skip
    return [
        *section("Fits", fit_rows(runs, fits)),
        *section("Layers", layer_rows(runs)),
        *section("Claims", claims(fits)),
        *section("Differences", difference_rows(fits)),
        *section("Compute multiplier", multipliers(fits)),
        *section("Growth of the multiplier", growth, "Slope of its logarithm per factor of ten in the budget [95 %]."),
        *section("Perplexity at the compute optimum (the paper's table 1)", ours),
        *(section("The paper's table 1", paper_perplexities(read_published())) if ours else []),
        *section("The compute optimum by two approaches", exponents(fits)),
        *section("Ranking under other FLOP conventions", conventions(fits), "Multiplier (rank at the budget)."),
    ]


def fit_rows(runs: pd.DataFrame, fits: Fits) -> Rows:
    """How the curves of each budget were fitted, and how well they fit."""
    rows = []
    for entry in (each for each in fits["budgets"] if each.get("scatter") is not None):
        batches = listed(runs.loc[usable(runs) & (runs["budget"] == entry["budget"]), "batch_sequences"])
        window = [number(end, "{:.3g}") for end in entry["window"] or ()]
        test, seeds = entry["equality"], entry["seeds_df"]
        rows.append({
            "budget": budget_name(entry["budget"]), "batch, sequences": batches,
            "FLOPs per token": " to ".join(window) or "all",
            "scatter about the curves": f"{entry['scatter']:.4f} ({entry['df']})",
            "scatter of seeds": f"{entry['seeds_sd']:.4f} ({seeds})" if seeds else "—",
            "F of one curvature": f"{test['f']:.2f} ({test['df'][0]}, {test['df'][1]})" if test else "—",
            "p": f"{test['p']:.2f}" if test else "—",
        })  # fmt: skip
    return rows


def layer_rows(runs: pd.DataFrame) -> Rows:
    """The settings of each method's layer."""
    layers = runs[usable(runs)].drop_duplicates("name").set_index("name").reindex(columns=[*LAYER]).dropna(how="all")
    settings = {str(name): found for name, found in layers.to_dict("index").items()}
    return [
        {"method": label(name), **{title: number(settings[name][key], "{:,g}") for key, title in LAYER.items()}}
        for name in ordered(settings)
    ]


def difference_rows(fits: Fits) -> Rows:
    """Each difference of two methods, once, with its 95 % interval and the parts of its standard error."""
    rows: dict[tuple[float, str, frozenset[str]], dict[str, str]] = {}
    for entry in fits["budgets"]:
        for one in (each for each in entry["differences"] if each.get("value") is not None):
            pair, own = frozenset((one["method"], one["reference"])), one.get("own")
            compared = (f"{label(one['method'])} minus {label(one['reference'])}", size_label(one["size"]))
            rows.setdefault((entry["budget"], one["size"], pair), {
                "budget": budget_name(entry["budget"]), "comparison": ", ".join(filter(None, compared)),
                "difference [95 %]": signed_interval(one),
                **{title: number(one[key], "{:.4f}") for key, title in PARTS.items()},
                "degrees of freedom": number(one["df"], "{:.0f}") if one["df"] else "∞",
                "with own curvatures ± s.e.":
                    f"{number(own['value'], '{:+.3f}')} ± {number(own['se'], '{:.3f}')}" if own else "—",
            })  # fmt: skip
    return list(rows.values())


def claims(fits: Fits) -> Rows:
    """Each comparison of the family with its probability, and what it came to."""
    rows = []
    for claim in fits["claims"]:
        (method, _, settings), (rival, _, others) = (claim[key].partition(" ") for key in ("method", "rival"))
        if settings != others:
            method, rival, settings = claim["method"], claim["rival"], ""
        named = (f"{label(method)} minus {label(rival)}", size_label(claim["size"]), in_words(settings))
        rows.append({
            "budget": budget_name(claim["budget"]), "comparison": ", ".join(filter(None, named)),
            "difference [95 %]": signed_interval(claim), "p": probability(claim["p"]),
            f"p, corrected for {claim['family']} claims": probability(claim["p_holm"]),
            "outcome": outcome(claim),
        })  # fmt: skip
    return rows


def multipliers(fits: Fits) -> Rows:
    """Compute multipliers with their intervals, by budget."""
    return [
        {"budget": budget_name(m["budget"]), "method": label(m["method"]),
         "compute multiplier [95 %]": with_interval(m["multiplier"], (m["low"], m["high"]), "{:.2f}")}
        for m in sorted(fits["multipliers"], key=lambda m: m["budget"])
    ]  # fmt: skip


def exponents(fits: Fits) -> Rows:
    """Exponents of the optimal FLOPs per token by approaches 2 and 3; predictions for the held-out largest budget.

    Empty if no method has the three budgets that a power law needs.
    """
    laws, rows = fits["laws"], []
    for name in ordered(fit["method"] for fit in laws.values()):
        isoflop, surface = laws.get(name, {}), laws.get(f"{name}/parametric", {})
        if isoflop.get("exponent") is None and not surface:
            continue
        row, held = {"method": label(name)}, surface.get("hold_out") or {}
        approaches = {"2: isoFLOP optima": (isoflop, "exponent"), "3: surface": (surface, "a")}
        for title, (fit, key) in approaches.items():
            row[title] = with_interval(fit.get(key), fit.get("ci", {}).get(key), "{:.3f}")
        row["largest budget: predicted"] = with_interval(held.get("predicted"), held.get("interval"), "{:.3f}")
        rows.append(row | {"observed": number(held.get("observed"), "{:.3f}")})
    return rows


def conventions(fits: Fits) -> Rows:
    """Multipliers under other FLOP conventions.

    Ranks are among the methods at one budget that are compared with the same dense curve.
    """
    curves = [m["name"] for entry in fits["budgets"] for m in entry["methods"]]
    groups: dict[tuple[float, str], dict[str, Mapping[str, float | None]]] = {}
    for found in fits["conventions"]:
        dense = same_variant("dense", found["method"], curves) or "dense"
        group = groups.setdefault((found["budget"], dense), {dense: dict.fromkeys(found["multipliers"], 1.0)})
        group[found["method"]] = found["multipliers"]
    return [
        {"budget": budget_name(budget), "method": label(name),
         **{c: _ranked(value, [other[c] for other in group.values()]) for c, value in found.items()}}
        for (budget, _), group in sorted(groups.items(), key=lambda pair: pair[0][0]) for name, found in group.items()
    ]  # fmt: skip


def _ranked(value: float | None, among: Iterable[float | None]) -> str:
    """A multiplier with its rank."""
    return "—" if value is None else f"{value:.3f} ({1 + sum(other is not None and other > value for other in among)})"
