"""The tables of a study, the paper's beside them, and its answer in one line.

    .venv/bin/python analysis/table.py SWEEP

What the study varies decides which: losses at the compute optimum with their errors, perplexities there (the paper's
table 1), compute multipliers and rankings under other FLOP conventions; a layer's settings at one size, and experts and
BatchNorm (table 2); learning rates.

Works on runs/SWEEP/study, else on results/SWEEP; writes the tables to table.md there and prints what decides.
"""

import re
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from peerscale.cell_names import budget_name
from peerscale.errors import exit_code
from peerscale.files import from_checkout, write_text
from peerscale.laws.optima import OptimumStatus
from peerscale.runs.rates import RATES, settings_table
from peerscale.runs.study import find_study, method_names, read_fits, study_parser, usable
from peerscale.runs.table import read_runs
from peerscale.viz import tables
from peerscale.viz.ablations import has_curves, over_seeds, varied
from peerscale.viz.answer import verdicts
from peerscale.viz.isoflop import missing_note
from peerscale.viz.published import read_published
from peerscale.viz.rates import edges
from peerscale.viz.style import label, listed, ordered, size_label
from peerscale.viz.tables import Fits, markdown, number, signed_interval, with_interval

SECTION = "\n## "

RATE_TITLES = {"lr": "learning rate", "table_lr": "rate of the tables", "mean": "mean over sizes"}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = study_parser(__doc__).parse_args(argv)
    study = find_study(arguments.sweep, arguments.runs, arguments.results)
    runs, published = read_runs(study.runs), read_published()
    fits = read_fits(study.fits)
    runs, settings = runs.assign(name=method_names(runs)), varied(runs)
    compared, rated = has_curves(runs) or not settings, settings & set(RATES)
    if compared:
        title, lines = "losses at equal compute", [f"**{fits['answer']}**", "", *closing_table(runs, fits)]
        lines += at_the_optimum(runs, fits, published)
    elif rated:
        about = f"Losses in nats per token on the {listed(runs['val_set'])} set. Rates are for the reference width."
        title, lines = "learning rates", [about, "", *best_rates(fits), *rates(runs)]
    else:
        title, lines = "settings at one size", settings_lines(runs, fits)
    if settings & {"n_experts", "query_norm"} and not rated:
        lines += experts_and_norm(runs, fits, published)
    text = "\n".join([f"# {arguments.sweep}: {title}", "", *lines])
    write_text(study.table, text)
    if compared:  # on a terminal the answer and its figure first, then what they rest on
        shown, *further = text.split(SECTION)
        figure = study.figures / "isoflop.png"
        print(f"\n{fits['answer']}\n" + f"Figure 1: {from_checkout(figure)}\n" * figure.is_file())
        print("\n".join(shown.splitlines()[4:]))
        if further:
            titles = "; ".join(section.partition("\n")[0] for section in further)
            print(f"\nFurther tables in {from_checkout(study.table)}: {titles}")
    else:
        print(text, end="")
    return 0


def closing_table(runs: pd.DataFrame, fits: Fits) -> list[str]:
    """A row a budget and method, and below it how it was fitted and what the study claims."""
    rows, notes = [], []
    entries = {entry["budget"]: entry for entry in fits["budgets"]}
    for budget in sorted(runs["budget"].unique()):
        at_budget, entry = runs[runs["budget"] == budget], entries.get(budget, {"methods": [], "differences": []})
        optima = {m["name"]: m for m in entry["methods"]}
        differences = {
            d["method"]: d for d in entry["differences"] if d["reference"].partition(" ")[0] == "dense" != d["method"]
        }
        for name in ordered(at_budget["name"]):
            mine = at_budget[at_budget["name"] == name]
            found, finished = optima.get(name), mine.loc[usable(mine), "size"].nunique()
            missing = mine.loc[~usable(mine), "status"].value_counts().sort_index()
            flags = [f"{n} {status}" for status, n in missing.items()]
            if found and found["status"] != OptimumStatus.OK:
                flags.append(found["status"].replace("_", " "))
            rows.append([
                budget_name(budget), label(name),
                f"{finished} finished, {len(found['sizes']) if found else 0} fitted",
                number(found and found["x"], "{:.3g}"), number(found and found["loss"], "{:.4f}"),
                number(found and found["own"]["loss"], "{:.4f}"),
                "reference" if name.partition(" ")[0] == "dense" else difference(differences.get(name)),
                "; ".join(flags) or "—",
            ])  # fmt: skip
        notes += fit_note(budget, entry)
    header = ("budget", "method", "sizes", "optimal FLOPs per token", "loss there", "loss with own curvature",
              "difference to dense [95 %]", "flags")  # fmt: skip
    return [
        *markdown(header, rows),
        "",
        "Validation losses in nats per token at the compute optimum, the minimum of a parabola in the logarithm of "
        "FLOPs per token. All methods of a budget are fitted together, over one window of sizes, with one curvature; "
        "the next column gives each method its own. Intervals are Student's and include the misfit of sizes, seeds and "
        "the sampling of validation sequences. They leave out the choice of learning rates. A minimum has no number if "
        "it lies outside the sampled sizes (outside range), if the fit does not open upwards (curvature) or has fewer "
        "than four sizes (too few). It is flagged if it lies in the outer fifth of the sizes (off centre). "
        f"FLOPs: {listed(runs['convention'])}.",
        "",
        *(f"- {line}" for line in (*verdicts(fits["claims"]), *notes)),
        "",
    ]


def fit_note(budget: float, entry: dict[str, Any]) -> list[str]:
    """How the fit of one budget came out."""
    if not entry["methods"] or entry["scatter"] is None:
        return []
    low, high = entry["window"] or (None, None)
    window = f"sizes of {low:.3g} to {high:.3g} FLOPs per token" if low else "all sizes"
    text = f"Fit at {budget_name(budget)}: {window.replace('e+0', 'e')}; size means scatter by {entry['scatter']:.4f} "
    text += f"nats about the curves ({entry['df']} degrees of freedom)"
    if entry["seeds_df"]:
        text += f", seeds by {entry['seeds_sd']:.4f} ({entry['seeds_df']})"
    if test := entry["equality"]:
        text += f"; one curvature for all: F({test['df'][0]}, {test['df'][1]}) = {test['f']:.2f}, p = {test['p']:.2f}"
    return [f"{text}."]


def difference(found: dict[str, Any] | None) -> str:
    """A difference with its interval, which says so where it holds nothing but the sampling of sequences."""
    if found is None or found.get("value") is None:
        return "—"
    alone = found["fit_se"] is None and found["seeds_se"] is None
    return signed_interval(found) + " (sequences only)" * alone


def section(title: str, table: Sequence[str], *notes: str) -> list[str]:
    return [f"## {title}", "", *table, "", *(line for note in notes for line in (note, ""))]


def at_the_optimum(runs: pd.DataFrame, fits: Fits, published: pd.DataFrame) -> list[str]:
    """Errors by source, multipliers, the paper's table 1, exponents, other conventions; as far as there are any."""
    lines: list[str] = []
    if parts := tables.parts_lines(fits):
        lines += section(
            "Errors by source",
            parts,
            "Standard errors (s.e.) in nats per token. Sizes: misfit of the curves; if no size has a second seed it "
            "includes the scatter of seeds. Sequences: sampling of the validation set, paired between methods. "
            "Learning rates: only in a study that brackets them. Last column: the difference if each method has its "
            "own curvature.",
        )
    if claims := tables.claim_lines(fits):
        lines += section(
            "Claims",
            claims,
            f"Two-sided t tests, corrected by Holm's method for the {len(fits['claims'])} comparisons of this table. A "
            "lead is claimed where the corrected p is below 0.05.",
        )
    if multipliers := tables.multiplier_lines(fits):
        slopes = [
            f"{label(g['method'])} {with_interval(g['slope'], (g['low'], g['high']), '{:+.3f}')}"
            for g in fits["growth"]
        ]
        grows = f"Slope of its logarithm per factor of ten in the budget: {', '.join(slopes)}." if slopes else (
            "No growth is claimed: it would need four budgets."
        )  # fmt: skip
        lines += section(
            "Compute multiplier",
            multipliers,
            "Dense's FLOPs over the FLOPs that the method needs for the same loss. Losses are interpolated between "
            "the budgets; intervals are from a joint bootstrap of all budgets.",
            grows,
        )
    ours, theirs = tables.perplexities(fits, str(runs["val_set"].iloc[0])), tables.paper_perplexities(published)
    if ours.empty:
        return lines
    absent = [name for name in theirs.columns if name not in ("budget", "name", "gap") and f"ppl_{name}" not in runs]
    lines += section(
        "Perplexity at the compute optimum (the paper's table 1)",
        tables.perplexity_lines(ours),
        "Perplexity on each evaluation set, at the minimum of the validation loss over FLOPs per token. Last column: "
        "difference to dense on the validation set, nats per token.",
        f"The paper's table 1, with the difference to dense on c4. This study has no {', '.join(absent)}. The "
        "paper's tokenizer and data differ from ours, so only the differences can be compared.",
    )
    lines += [*tables.perplexity_lines(theirs), ""]
    if exponents := tables.exponent_lines(fits):
        lines += section(
            "The compute optimum by three approaches",
            exponents,
            "Exponent b of optimal FLOPs per token = a × FLOPs^b [95 %, bootstrap]. 1: from the lowest curve at "
            "each compute, in mid-run before the learning rate has decayed; 2: from the fitted minima; 3: from the "
            "surface loss = E + A / N^alpha + B / D^beta through all runs. Last two columns: the mean loss of the "
            "largest budget's runs, predicted by a surface through the smaller budgets, and observed. All "
            "coefficients: fits.json.",
        )
    elif runs["budget"].nunique() < 3:
        lines += ["No exponents: they need three budgets.", ""]
    if conventions := tables.convention_lines(fits):
        lines += section(
            "Ranking under other FLOP conventions",
            conventions,
            "Compute multiplier and, in brackets, the method's rank at the budget. Losses at the optimum are those of "
            "the first table; each convention counts anew what they cost. A dash: it would be an extrapolation.",
        )
    return lines


def settings_lines(runs: pd.DataFrame, fits: Fits) -> list[str]:
    """A row for each variant of a study of one size, over its seeds."""
    done = runs[usable(runs)]
    order = {name: i for i, name in enumerate(done["name"].unique())}  # the plan's, in which settings ascend
    variants = over_seeds(done, ["size", "budget", "name"]).sort_values("name", key=lambda names: names.map(order))
    columns = ["layer_share", "expert_usage", "unevenness"]
    others = done.groupby(["size", "budget", "name"], as_index=False)[columns].mean()
    differences = {
        (entry["budget"], found["size"], found["method"]): found
        for entry in fits["budgets"]
        for found in entry["differences"]
        if found["reference"].partition(" ")[0] == "dense"
    }
    rows = [
        [
            budget_name(row["budget"]), size_label(row["size"]), label(row["name"]), str(row["seeds"]),
            f"{row['mean']:.4f}", f"{np.exp(row['mean']):.2f}",
            "reference" if row["name"].partition(" ")[0] == "dense"
            else difference(differences.get((row["budget"], row["size"], row["name"]))),
            number(row["layer_share"], "{:.1%}"), number(row["expert_usage"], "{:.1%}"), number(row["unevenness"]),
        ]
        for row in variants.merge(others, how="left").to_dict("records")
    ]  # fmt: skip
    header = ("budget", "size", "method", "seeds", "loss", "perplexity", "difference to dense [95 %]",
              "layer's share of FLOPs", "experts used", "unevenness")  # fmt: skip
    return [
        *markdown(header, rows),
        "",
        "Validation losses in nats per token, means over seeds. Intervals include the sampling of validation sequences "
        "and, where there are several seeds, their scatter, pooled over the rows. With one seed they leave seeds out "
        "(sequences only). In other studies seeds scatter by 0.004 to 0.010 nats, so a difference of that size is no "
        "evidence. Experts used and unevenness: the paper's definitions (section 3.3). "
        f"FLOPs: {listed(runs['convention'])}.",
        "",
        *([f"- {missing_note(runs)}.", ""] if missing_note(runs) else []),
    ]


def experts_and_norm(runs: pd.DataFrame, fits: Fits, published: pd.DataFrame) -> list[str]:
    """The paper's table 2 beside ours, and what BatchNorm changes."""
    lines = section(
        "Experts and BatchNorm on the queries (the paper's table 2)",
        tables.norm_lines(tables.experts_by_norm(runs, published)),
        "Pairs: without / with BatchNorm. Experts used and unevenness: by the paper's section 3.3, ours over "
        f"{listed(runs['usage_tokens'])} tokens.",
    )
    pairs = [
        [label(re.sub("[ -]query_norm=true", "", found["method"])), difference(found)]
        for entry in fits["budgets"]
        for found in entry["differences"]
        if "query_norm=true" in found["method"] and "query_norm=false" in found["reference"]
    ]
    if pairs:
        table = markdown(["method", "loss with BatchNorm minus loss without [95 %]"], pairs)
        lines += section("What BatchNorm on the queries changes", table)
    return lines


def best_rates(fits: Fits) -> list[str]:
    """The best rate of each method and size, and methods compared at their best rates."""
    best = [
        [budget_name(b["budget"]), size_label(b["size"]), label(b["method"]), number(b["rate"], "{:.3g}"),
         number(b["loss"], "{:.4f}"), f"{b['best_tried']['rate']:g}", f"{b['best_tried']['loss']:.4f}",
         b["status"].replace("_", " ")]
        for b in fits["rates"]["best"]
    ]  # fmt: skip
    if not best:
        return []
    names = ("budget", "size", "method", "best rate, fitted", "loss there", "best rate tried", "loss at that", "status")
    lines = section(
        "Best rates",
        markdown(names, best),
        "The minimum of a parabola in the logarithm of the rate, with one curvature for all methods and sizes of a "
        "budget, through the rates near the best one tried.",
    )
    pairs = [
        [budget_name(d["budget"]), size_label(d["size"]), label(d["method"]), signed_interval(d)]
        for d in fits["rates"]["differences"]
    ]
    if pairs:
        header = ("budget", "size", "method", "difference to dense, each at its best rate [95 %]")
        lines += section(
            "Methods at their best rates",
            markdown(header, pairs),
            "The interval includes the scatter about the parabolas, not seeds: one seed tried all rates of a model.",
        )
    return lines


def rates(runs: pd.DataFrame) -> list[str]:
    """The settings of a learning-rate study, best first."""
    lines: list[str] = []
    for name, rows in settings_table(runs).groupby("name", sort=False):
        rated = [rate for rate in RATES if (rows[rate] > 0).any()]
        sizes = [str(column) for column in rows if column not in ("name", *RATES)]
        sizes = sizes[:-1] if len(sizes) == 2 else sizes  # the mean of one size is its loss
        texts = [
            [*(f"{row[rate]:g}" for rate in rated), *(f"{row[size]:.4f}" for size in sizes)]
            for row in rows.to_dict("records")
        ]
        header = [RATE_TITLES.get(column, size_label(column)) for column in (*rated, *sizes)]
        lines += section(label(str(name)), markdown(header, texts), *(f"- {edge}" for edge in edges(rows)))
    return lines


if __name__ == "__main__":
    sys.exit(exit_code(main))
