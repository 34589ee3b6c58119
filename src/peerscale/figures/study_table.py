"""The tables of a study, for its `table.md`; the study's axes decide which ones.

They are losses at the compute optimum with their errors, perplexities there (the paper's table 1), compute multipliers
and rankings under other FLOP conventions; or a layer's settings at one size, with the paper's table 2; or learning
rates.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from peerscale.figures.ablations import varied
from peerscale.figures.answer import verdicts
from peerscale.figures.brackets import brackets_section, hold_rates, how_rates_count, what_intervals_hold
from peerscale.figures.differences import against_dense, to_dense
from peerscale.figures.isoflop import by_budget, missing_note, status_counts
from peerscale.figures.markdown import number, probability, section, signed_interval, table, with_interval
from peerscale.figures.paper_tables import norm_rows, paper_perplexities, perplexities
from peerscale.figures.published import read_published
from peerscale.figures.rate_law import finished_cells, rate_law_sections
from peerscale.figures.style import in_words, label, listed, ordered, size_label
from peerscale.plan.cell_names import budget_name
from peerscale.stats.claims import turned
from peerscale.stats.curves_of_runs import (
    batches,
    budgets_with_curves,
    is_dense,
    method_names,
    same_variant,
    usable,
    without_brackets,
)
from peerscale.stats.optima import OptimumStatus
from peerscale.stats.rates import tries_rates

Fits = Mapping[str, Any]
"""A study's `fits.json`."""
Rows = list[dict[str, str]]
"""Rows of a table by its headings."""


def study_table(sweep: str, runs: pd.DataFrame, fits: Fits, withdrawn: str = "") -> str:
    """`table.md` of a study from its table of runs, `fits.json` and, if its results are withdrawn, the reason."""
    every, runs = runs, without_brackets(runs)
    runs, published = runs.assign(name=method_names(runs)), read_published()
    if compares_curves(runs):
        title, lines = "losses at equal compute", [f"**{fits['answer']}**", "", *closing_table(runs, fits)]
        lines += at_the_optimum(runs, fits, published)
    elif tries_rates(runs):
        law = fits["rates"].get("law")
        title, lines = "learning rates", rate_law_sections(runs, law) if law else finished_cells(runs)
    else:
        sizes = runs["size"].nunique()
        title = f"settings at {'one size' if sizes == 1 else f'{sizes} sizes'}"
        lines = [f"**{fits['answer']}**", ""] * bool(fits["claims"])
        lines += [*settings_lines(runs, fits), *claims_section(fits)]
    changed = varied(runs[runs["method"] == "peer"])
    if changed & {"n_experts", "query_norm"} and not changed & {"lr", "table_lr"}:
        lines += experts_and_norm(runs, fits, published)
    lines += brackets_section(every, fits)
    first = [f"**Withdrawn:** {withdrawn}", ""] if withdrawn else []
    return "\n".join([f"# {sweep}: {title}", "", *first, *lines])


def compares_curves(runs: pd.DataFrame) -> bool:
    """Whether a study compares methods over sizes rather than settings at one size."""
    return bool(budgets_with_curves(runs[usable(runs)])) or not varied(runs)


def closing_table(runs: pd.DataFrame, fits: Fits) -> list[str]:
    """One row per budget and method; below, notes on the fits and the study's claims."""
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
                "difference to dense [95 %]":
                    against_dense(differences, budget, "", name),
                "flags": "; ".join(flags) or "—",
            })  # fmt: skip
    notes = [*verdicts(fits["claims"]), *map(fit_note, fits["budgets"]), layers(runs)]
    return [
        *table(rows),
        "",
        "Validation losses in nats per token at the compute optimum, the minimum of a parabola in the logarithm of "
        "FLOPs per token. All methods of a budget are fitted together, over one window of sizes, with one curvature; "
        "the next column gives each method its own. Intervals are Student's and include the misfit of sizes, seeds and "
        f"the sampling of validation sequences. {what_intervals_hold(fits)} A minimum has no number if "
        "it lies outside the sampled sizes (outside range), if the fit does not open upwards (curvature) or has fewer "
        "than four sizes (too few). It is flagged if it lies in the outer fifth of the sizes (off centre). "
        f"FLOPs: {listed(runs['convention'])}.",
        "",
        *(f"- {line}" for line in notes if line),
        "",
    ]


def layers(runs: pd.DataFrame) -> str:
    """The settings of each method's layer: `Layers: PEER 4,096 experts, 4 heads, top 16.`; empty if there are none."""
    words = {"n_experts": "{:,.0f} experts", "ffn_heads": "{:.0f} heads", "top_k": "top {:.0f}",
             "capacity_factor": "capacity {:g}"}  # fmt: skip
    finished = runs[usable(runs)].drop_duplicates("name").set_index("name").reindex(columns=[*words])
    each = {str(name): ", ".join(words[str(key)].format(value) for key, value in row.dropna().items())
            for name, row in finished.iterrows()}  # fmt: skip
    texts = [f"{label(name.partition(' ')[0])} {each[name]}" for name in ordered(each) if each[name]]
    return f"Layers: {'; '.join(dict.fromkeys(texts))}." if texts else ""


def fit_note(entry: Mapping[str, Any]) -> str:
    """A note on the fit of one budget; empty if nothing could be fitted."""
    if entry.get("scatter") is None:
        return ""
    low, high = entry["window"] or (None, None)
    window = f"sizes of {low:.3g} to {high:.3g} FLOPs per token" if low else "all sizes"
    text = f"Fit at {budget_name(entry['budget'])}: {window.replace('e+0', 'e')}; size means scatter "
    text += f"by {entry['scatter']:.4f} nats about the curves ({entry['df']} degrees of freedom)"
    if entry["seeds_df"]:
        text += f", seeds by {entry['seeds_sd']:.4f} ({entry['seeds_df']})"
    if test := entry["equality"]:
        text += f"; one curvature for all: F({test['df'][0]}, {test['df'][1]}) = {test['f']:.2f}, p = {test['p']:.2f}"
    return f"{text}."


def at_the_optimum(runs: pd.DataFrame, fits: Fits, published: pd.DataFrame) -> list[str]:
    """The available ones of: errors by source, multipliers, the paper's table 1, exponents, other conventions."""
    slopes = [f"{label(g['method'])} {with_interval(g['slope'], (g['low'], g['high']), '{:+.3f}')}"
              for g in fits["growth"]]  # fmt: skip
    lines = section(
        "Errors by source",
        parts(fits),
        "Standard errors (s.e.) in nats per token. Sizes: misfit of the curves; if no size has a second seed it "
        "includes the scatter of seeds. Sequences: sampling of the validation set, paired between methods. "
        f"{how_rates_count(fits)} Last column: the difference if each method has its own curvature.",
    )
    lines += claims_section(fits)
    lines += section("Other settings", other_settings(fits), "Descriptive; errors as in the table of errors by source.")
    lines += section(
        "Compute multiplier",
        multipliers(fits),
        "Dense's FLOPs over the FLOPs that the method needs for the same loss. Losses are interpolated between "
        "the budgets; intervals are from a joint bootstrap of all budgets.",
        f"Slope of its logarithm per factor of ten in the budget{_trend(runs, fits)}: {', '.join(slopes)}."
        if slopes
        else "No growth is claimed: it would need four budgets.",
    )
    ours, theirs = perplexities(fits), paper_perplexities(published)
    if not ours:
        return lines
    _, _, *sets, _ = theirs[0]
    absent = [name for name in sets if f"ppl_{name}" not in runs]
    lines += section(
        "Perplexity at the compute optimum (the paper's table 1)",
        ours,
        "Perplexity on each evaluation set, at the minimum of the validation loss over FLOPs per token. Last column: "
        "difference to dense on the validation set, nats per token.",
        f"The paper's table 1, with the difference to dense on c4. This study has no {', '.join(absent)}. The "
        "paper's tokenizer and data differ from ours, so only the differences can be compared.",
    )
    lines += [*table(theirs), ""]
    lines += section(
        "The compute optimum by three approaches",
        exponents(fits),
        "Exponent b of optimal FLOPs per token = a × FLOPs^b [95 %, bootstrap]. 1: from the lowest curve at "
        "each compute, in mid-run before the learning rate has decayed; 2: from the fitted minima; 3: from the "
        "surface loss = E + A / N^alpha + B / D^beta through all runs. Last two columns: the mean loss of the "
        "largest budget's runs, predicted by a surface through the smaller budgets, and observed. All "
        "coefficients: fits.json.",
    ) or ["No exponents: they need three budgets.", ""] * (runs["budget"].nunique() < 3)
    return lines + section(
        "Ranking under other FLOP conventions",
        conventions(fits),
        "Compute multiplier and, in brackets, the method's rank at the budget. Losses at the optimum are those of "
        "the first table; each convention counts anew what they cost. A dash: it would be an extrapolation.",
    )


def parts(fits: Fits) -> Rows:
    """Each difference to dense with its 95 % interval and the parts of its standard error."""
    keys = {"fit_se": "s.e. from sizes", "seeds_se": "s.e. from seeds", "sequences_se": "s.e. from sequences",
            "rate_se": "s.e. from learning rates", "se": "s.e., all"}  # fmt: skip
    return [
        {
            "budget": budget_name(budget), "method": ", ".join(filter(None, (label(method), size_label(size)))),
            "difference to dense [95 %]": signed_interval(found),
            **{title: number(found[key], "{:.4f}") for key, title in keys.items()},
            "degrees of freedom": number(found["df"], "{:.0f}") if found["df"] else "∞",
            "difference with own curvatures ± s.e.":
                f"{number(own['value'], '{:+.3f}')} ± {number(own['se'], '{:.3f}')}" if own else "—",
        }
        for (budget, size, method), found in to_dense(fits).items() if found.get("value") is not None
        for own in [found.get("own")]
    ]  # fmt: skip


def claims_section(fits: Fits) -> list[str]:
    """The claims, and how they are tested; empty if there are none."""
    return section("Claims", claims(fits), _family(fits["claims"]))


def claims(fits: Fits) -> Rows:
    """Each comparison of the family with its probability."""
    rows = []
    for claim in fits["claims"]:
        (method, _, settings), (rival, _, others) = (claim[key].partition(" ") for key in ("method", "rival"))
        if settings != others:
            method, rival, settings = claim["method"], claim["rival"], ""
        named = (f"{label(method)} minus {label(rival)}", size_label(claim["size"]), in_words(settings))
        rows.append({
            "budget": budget_name(claim["budget"]), "comparison": ", ".join(filter(None, named)),
            "difference [95 %]": signed_interval(claim), "p": probability(claim["p"]),
            "p, corrected for the family": probability(claim["p_holm"]),
        })  # fmt: skip
        if "equal" in claim:
            rows[-1][f"equal within {claim['equal_within']:g}"] = "yes" if claim["equal"] else "no"
    return rows


def other_settings(fits: Fits) -> Rows:
    """Each variant of a method less the usual setting, the rivals and their variants, but for dense (see `to_dense`).

    Empty if the study claims nothing: then its variants are compared with dense alone, or by their learning rates.
    """
    rows: dict[tuple[str, str, frozenset[str]], dict[str, str]] = {}
    for entry in fits["budgets"] if fits["claims"] else ():
        for found in (each for each in entry["differences"] if each.get("value") is not None):
            one = found if " " in found["method"] else turned(found)
            method, reference = one["method"], one["reference"]
            ours, theirs = (name.partition(" ")[2] for name in (method, reference))
            if ours and ours != theirs and not is_dense(reference):
                compared = f"{label(method)} minus {label(reference)}"
                place = (budget_name(entry["budget"]), size_label(found["size"]))
                rows.setdefault((*place, frozenset((method, reference))), {
                    "budget": place[0], "comparison": ", ".join(filter(None, (compared, place[1]))),
                    "difference [95 %]": signed_interval(one)})  # fmt: skip
    return list(rows.values())


def _family(claims: list[dict[str, Any]]) -> str:
    """How the claims are tested."""
    n = claims[0]["family"] if claims else 0
    missing = f", of which {n - len(claims)} have no result yet and count as p = 1" if n > len(claims) else ""
    return (
        f"Two-sided t tests, corrected by Holm's method for the {n} comparisons that the study claims{missing}. A "
        "lead is claimed where the corrected p is below 0.05."
    )


def _trend(runs: pd.DataFrame, fits: Fits) -> str:
    """What else differs between the budgets of a trend."""
    start = fits.get("trend_from", 0.0)
    changes = batches(runs, [entry["budget"] for entry in fits["budgets"] if entry["budget"] >= start])
    return f" (the batch changes too: {changes})" if changes else ""


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


def settings_lines(runs: pd.DataFrame, fits: Fits) -> list[str]:
    """One row per variant and size, over its seeds."""
    done = runs[usable(runs)]
    plan = {column: list(done[column].unique()) for column in ("budget", "size", "name")}  # there settings ascend
    columns = ["val_loss", "layer_share", "expert_usage", "unevenness"]
    groups = done.astype(dict.fromkeys(columns, float)).groupby([*plan], as_index=False)
    variants = groups.agg(seeds=("seed", "size"), **{column: (column, "mean") for column in columns})
    variants = variants.sort_values([*plan], key=lambda column: column.map(plan[str(column.name)].index))
    differences = to_dense(fits)
    held = f"{what_intervals_hold(fits)} {how_rates_count(fits)} " if hold_rates(fits) else ""
    rows = [
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
    return [
        *table(rows),
        "",
        f"Losses in nats per token on the {listed(runs['val_set'])} set, means over seeds. Intervals include the "
        "sampling of its sequences and, where there are several seeds, their scatter, pooled over the rows. With one "
        "seed they leave seeds out (sequences only). In other studies seeds scatter by 0.004 to 0.017 nats, so a "
        f"difference of that size is no evidence. {held}Experts used and unevenness: the paper's definitions "
        "(section 3.3). "
        f"FLOPs: {listed(runs['convention'])}.",
        "",
        *([f"- {missing_note(runs)}.", ""] if missing_note(runs) else []),
    ]


def experts_and_norm(runs: pd.DataFrame, fits: Fits, published: pd.DataFrame) -> list[str]:
    """The paper's table 2 beside ours, for runs of one size and budget, and the effect of BatchNorm."""
    pairs = [
        {"method": label(re.sub("[ -]query_norm=true", "", found["method"])),
         "loss with BatchNorm minus loss without [95 %]": signed_interval(found)}
        for entry in fits["budgets"] for found in entry["differences"]
        if "query_norm=true" in found["method"] and "query_norm=false" in found["reference"]
    ]  # fmt: skip
    return section(
        "Experts and BatchNorm on the queries (the paper's table 2)",
        norm_rows(runs, published) if len(runs[["size", "budget"]].drop_duplicates()) == 1 else [],
        "Pairs: without / with BatchNorm. Experts used and unevenness: by the paper's section 3.3, ours over "
        f"{listed(runs['usage_tokens'])} tokens.",
    ) + section("What BatchNorm on the queries changes", pairs)
