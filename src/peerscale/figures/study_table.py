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
from peerscale.figures.answer import answer, outcome
from peerscale.figures.brackets import brackets_section
from peerscale.figures.differences import difference_column, shown_difference, to_baseline
from peerscale.figures.isoflop import optima
from peerscale.figures.markdown import Rows, number, probability, section, signed_interval, table, with_interval
from peerscale.figures.paper_tables import norm_rows, paper_perplexities, perplexities
from peerscale.figures.published import LAYER, read_published
from peerscale.figures.rate_law import finished_cells, rate_law_sections, table_law_section
from peerscale.figures.style import in_words, label, listed, ordered, size_label
from peerscale.figures.verdicts import not_tuned, verdict_rows
from peerscale.plan.cell_names import budget_name
from peerscale.stats.brackets import NOT_TUNED
from peerscale.stats.curve import Curve, by_budget, by_curve, curves_of, finished, usable, without_brackets
from peerscale.stats.optima import OptimumStatus
from peerscale.stats.rates import tries_rates

Fits = Mapping[str, Any]
"""A study's fits, from `read_fits`."""

SETTINGS = {"n_experts": "experts", "ffn_heads": "heads", "top_k": "top k", "capacity_factor": "capacity factor"}
"""Columns of the settings of a layer."""

PARTS = {"fit_se": "s.e. from sizes", "seeds_se": "s.e. from seeds", "sequences_se": "s.e. from sequences",
         "rate_se": "s.e. from learning rates", "se": "s.e., all"}  # fmt: skip
"""Parts of the standard error of a difference."""


def study_table(sweep: str, runs: pd.DataFrame, fits: Fits, withdrawn: str = "") -> str:
    """`table.md` of a study from its table of runs, its fits and, if its results are withdrawn, the reason."""
    done, of_curves = finished(runs), compares_curves(fits)
    if tries_rates(runs) and not of_curves:
        law = fits["rates"].get("law")
        planned = len(without_brackets(runs))
        title, lines = "learning rates", rate_law_sections(done, law) if law else finished_cells(done, planned)
    else:
        lines = [*headline(fits), *table(main_rows(runs, fits)), ""]
        lines += [f"Nats per token; FLOPs: {listed(runs['convention'])}.", ""]
        title = "losses at equal compute"
        if of_curves:
            lines += at_the_optimum(done, fits)
        else:
            title = f"settings at {'one size' if runs['size'].nunique() == 1 else 'several sizes'}"
            lines += [*section("Claims", claims(fits)), *section("Differences", difference_rows(fits))]
    layer = done[done["curve"].map(lambda curve: curve.method == LAYER)]
    changed, places = varied(layer["curve"]), layer[["size", "budget"]].drop_duplicates()
    if changed & {"ffn.n_experts", "ffn.query_norm"} and not tries_rates(runs) and len(places) == 1:
        title_of_paper = "Experts and BatchNorm on the queries (the paper's table 2)"
        lines += section(title_of_paper, norm_rows(layer, read_published()), "Pairs: without / with BatchNorm.")
    lines += [*table_law_section(fits), *brackets_section(fits)]
    first = [f"**Withdrawn:** {withdrawn}", ""] if withdrawn else []
    return "\n".join([f"# {sweep}: {title}", "", *first, *lines])


def headline(fits: Fits) -> list[str]:
    """What the claims came to, and each guest against the baseline; without claims every method against it."""
    claimed = bool(fits["claims"])
    rows = verdict_rows(fits, fits.get("guests", ()) if claimed else None)
    who = "Methods that the sweep's file does not name" if claimed else "Every method"
    said = f"{who} minus {label(Curve(fits['baseline']))}, uncorrected for the number of comparisons:"
    lines = [f"**{answer(fits)}**", ""] if claimed or not rows else []
    if claimed:
        n = fits["claims"][0]["family"]
        lines += [f"Verdicts are corrected for {n} claims (Holm); the intervals, and p of `make compare`, are not.", ""]
    return [*lines, f"**{said}**", "", *table(rows), ""] if rows else lines


def compares_curves(fits: Fits) -> bool:
    """Whether a study compares methods over sizes, as it does if there are curves or nothing else that it varies."""
    return any(entry["methods"] for entry in fits["budgets"]) or not varied(fits["curves"].values())


def main_rows(runs: pd.DataFrame, fits: Fits) -> Rows:
    """The first table of a study: optima, or a row per variant at each size."""
    return optimum_rows(runs, fits) if compares_curves(fits) else settings_rows(finished(runs), fits)


def optimum_rows(runs: pd.DataFrame, fits: Fits) -> Rows:
    """One row per budget and curve: the compute optimum, and its difference to the baseline."""
    rows, main, differences = [], without_brackets(runs), to_baseline(fits)
    entries = {entry["budget"]: entry for entry in fits["budgets"]}
    for budget, cells in by_budget(main.assign(curve=curves_of(main))).items():
        for curve in ordered(cells["curve"]):
            mine, found = cells[cells["curve"] == curve], optima(fits).get(budget, {}).get(curve)
            unfinished = mine.loc[~usable(mine), "status"].value_counts().sort_index()
            flags = [f"{n} {status}" for status, n in unfinished.items()]
            if found and found["status"] != OptimumStatus.OK:
                flags.append(found["status"].replace("_", " "))
            if found and found["loss"] is not None and entries[budget]["df"] == 0:
                flags.append("no error: no more sizes than coefficients")
            n_finished = mine.loc[usable(mine), "size"].nunique()
            rows.append({
                "budget": budget_name(budget), "method": label(curve),
                "sizes": f"{n_finished} finished, {len(found['sizes']) if found else 0} fitted",
                "optimal FLOPs per token": number(found and found["x"], "{:.3g}"),
                "loss there": number(found and found["loss"], "{:.4f}"),
                "loss with own curvature": number(found and found["own"]["loss"], "{:.4f}"),
                f"{difference_column(fits)} [95 %]":
                    shown_difference(fits, differences.get((budget, "", curve)), curve),
                "flags": "; ".join(flags) or "—",
            })  # fmt: skip
    return rows


def settings_rows(done: pd.DataFrame, fits: Fits) -> Rows:
    """One row per variant and size, over its seeds."""
    columns, differences = ["val_loss", "layer_share", "expert_usage", "unevenness"], to_baseline(fits)
    rows = []
    for budget, at_budget in by_budget(done).items():
        for size, at_size in at_budget.groupby("size", sort=False):
            for curve, seeds in by_curve(at_size).items():
                loss, share, usage, unevenness = seeds[columns].astype(float).mean()
                rows.append({
                    "budget": budget_name(budget), "size": size_label(str(size)), "method": label(curve),
                    "seeds": str(len(seeds)), "loss": number(loss, "{:.4f}"), "perplexity": number(np.exp(loss)),
                    f"{difference_column(fits)} [95 %]":
                        shown_difference(fits, differences.get((budget, str(size), curve)), curve),
                    "layer's share of FLOPs": number(share, "{:.1%}"),
                    "experts used": number(usage, "{:.1%}"), "unevenness": number(unevenness),
                })  # fmt: skip
    return rows


def at_the_optimum(done: pd.DataFrame, fits: Fits) -> list[str]:
    """The sections of a study of optima; those without rows are left out."""
    ours, growth = perplexities(fits), [
        {"method": label(one["method"]), "slope": with_interval(one["slope"], (one["low"], one["high"]), "{:+.3f}")}
        for one in fits["growth"]
    ]  # fmt: skip
    return [
        *section("Fits", fit_rows(done, fits)),
        *section("Layers", layer_rows(done)),
        *section("Claims", claims(fits)),
        *section("Differences", difference_rows(fits)),
        *section("Compute multiplier", multipliers(fits)),
        *section("Growth of the multiplier", growth, "Slope of its logarithm per factor of ten in the budget [95 %]."),
        *section("Perplexity at the compute optimum (the paper's table 1)", ours),
        *(section("The paper's table 1", paper_perplexities(read_published())) if ours else []),
        *section("The compute optimum by two approaches", exponents(fits)),
        *section("Ranking under other FLOP conventions", conventions(fits), "Multiplier (rank at the budget)."),
    ]


def fit_rows(done: pd.DataFrame, fits: Fits) -> Rows:
    """How the curves of each budget were fitted, and how well they fit."""
    rows = []
    for entry in (each for each in fits["budgets"] if each.get("scatter") is not None):
        batches = listed(done.loc[done["budget"] == entry["budget"], "batch_sequences"])
        test, seeds = entry["equality"], entry["seeds_df"]
        rows.append({
            "budget": budget_name(entry["budget"]), "batch, sequences": batches,
            "scatter about the curves": f"{entry['scatter']:.4f} ({entry['df']})",
            "scatter of seeds": f"{entry['seeds_sd']:.4f} ({seeds})" if seeds else "—",
            "F of one curvature": f"{test['f']:.2f} ({test['df'][0]}, {test['df'][1]})" if test else "—",
            "p": f"{test['p']:.2f}" if test else "—",
        })  # fmt: skip
    return rows


def layer_rows(done: pd.DataFrame) -> Rows:
    """The settings of each curve's layer."""
    layers = {curve: rows.reindex(columns=[*SETTINGS]).iloc[0] for curve, rows in by_curve(done).items()}
    return [
        {"method": label(curve), **{title: number(layers[curve][key], "{:,g}") for key, title in SETTINGS.items()}}
        for curve in ordered(layers)
        if layers[curve].notna().any()
    ]


def difference_rows(fits: Fits) -> Rows:
    """Each difference of two methods, once, with its 95 % interval and the parts of its standard error."""
    rows: dict[tuple[float, str, frozenset[Curve]], dict[str, str]] = {}
    for entry in fits["budgets"]:
        for one in (each for each in entry["differences"] if each.get("value") is not None):
            pair, own = frozenset((one["method"], one["reference"])), one.get("own")
            compared = (f"{label(one['method'])} minus {label(one['reference'])}", size_label(one["size"]))
            rows.setdefault((entry["budget"], one["size"], pair), {
                "budget": budget_name(entry["budget"]), "comparison": ", ".join(filter(None, compared)),
                "difference [95 %]": signed_interval(one),
                **{title: number(one[key], "{:.4f}") for key, title in PARTS.items()},
                **({PARTS["rate_se"]: NOT_TUNED} if any(not_tuned(fits, entry["budget"], of) for of in pair) else {}),
                "degrees of freedom": number(one["df"], "{:.0f}") if one["df"] else "∞",
                "with own curvatures ± s.e.":
                    f"{number(own['value'], '{:+.3f}')} ± {number(own['se'], '{:.3f}')}" if own else "—",
            })  # fmt: skip
    return list(rows.values())


def claims(fits: Fits) -> Rows:
    """Each comparison of the family with its probability, and what it came to."""
    rows = []
    for claim in fits["claims"]:
        method, rival = claim["method"], claim["rival"]
        common = method.settings == rival.settings
        of_both = [label(one.plain if common else one) for one in (method, rival)]
        named = (" minus ".join(of_both), size_label(claim["size"]), in_words(method) if common else "")
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
    for curve in ordered(fit["method"] for fit in laws.values()):
        isoflop, surface = laws.get(str(curve), {}), laws.get(f"{curve}/parametric", {})
        row, held = {"method": label(curve)}, surface.get("hold_out") or {}
        approaches = {"2: isoFLOP optima": (isoflop, "exponent"), "3: surface": (surface, "a")}
        for title, (fit, key) in approaches.items():
            row[title] = with_interval(fit.get(key), fit.get("ci", {}).get(key), "{:.3f}")
        row["largest budget: predicted"] = with_interval(held.get("predicted"), held.get("interval"), "{:.3f}")
        rows.append(row | {"observed": number(held.get("observed"), "{:.3f}")})
    return rows


def conventions(fits: Fits) -> Rows:
    """Multipliers under other FLOP conventions.

    Ranks are among the curves at one budget that are compared with the same baseline.
    """
    groups: dict[tuple[float, Curve], dict[Curve, Mapping[str, float | None]]] = {}
    fitted = {m["name"] for entry in fits["budgets"] for m in entry["methods"]}
    for found in fits["conventions"]:
        reference = found["method"].counterpart(fits["baseline"], fitted) or Curve(fits["baseline"])
        group = groups.setdefault((found["budget"], reference), {reference: dict.fromkeys(found["multipliers"], 1.0)})
        group[found["method"]] = found["multipliers"]
    return [
        {"budget": budget_name(budget), "method": label(curve),
         **{c: _ranked(value, [other[c] for other in group.values()]) for c, value in found.items()}}
        for (budget, _), group in sorted(groups.items(), key=lambda pair: pair[0][0]) for curve, found in group.items()
    ]  # fmt: skip


def _ranked(value: float | None, among: Iterable[float | None]) -> str:
    """A multiplier with its rank."""
    return "—" if value is None else f"{value:.3f} ({1 + sum(other is not None and other > value for other in among)})"
