"""The tables of a study, the paper's beside them, and its answer in one line.

    .venv/bin/python analysis/table.py SWEEP

What the study varies decides which: losses at the compute optimum with their errors, perplexities there (the paper's
table 1), compute multipliers and rankings under other FLOP conventions; a layer's settings at one size, and experts and
BatchNorm (table 2); learning rates.

Works on runs/SWEEP/study, else on results/SWEEP; writes the tables to table.md there and prints what decides.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from peerscale.errors import exit_code
from peerscale.files import ROOT, write_text
from peerscale.laws.optima import OptimumStatus
from peerscale.runs.rates import settings_table
from peerscale.runs.study import find_study, method_names, read_fits, study_parser, usable
from peerscale.runs.table import read_runs
from peerscale.sweeper import budget_name
from peerscale.viz import tables
from peerscale.viz.ablations import has_curves, over_seeds, varied
from peerscale.viz.answer import verdicts
from peerscale.viz.isoflop import missing_note
from peerscale.viz.published import read_published
from peerscale.viz.rates import edges
from peerscale.viz.style import label, listed, ordered
from peerscale.viz.tables import Fits, markdown, number, signed_interval, with_interval

SECTION = "\n## "


def main(argv: Sequence[str] | None = None) -> int:
    arguments = study_parser(__doc__).parse_args(argv)
    study = find_study(arguments.sweep, arguments.runs, arguments.results)
    runs, published, fits = read_runs(study.runs), read_published(), read_fits(study.fits)
    runs, settings = runs.assign(name=method_names(runs)), varied(runs)
    compared = has_curves(runs) or not settings
    if compared:
        title, lines = "losses at equal compute", [f"**{fits['answer']}**", "", *closing_table(runs, fits)]
        lines += at_the_optimum(runs, fits, published)
    elif settings & {"lr", "table_lr"}:
        title, lines = "learning rates", [*best_rates(fits), *rates(runs)]
    else:
        title, lines = "settings at one size", settings_lines(runs, fits)
    if settings & {"n_experts", "query_norm"}:
        lines += experts_and_norm(runs, fits, published)
    text = "\n".join([f"# {arguments.sweep}: {title}", "", *lines])
    write_text(study.table, text)
    if compared:  # on a terminal the answer and its figure first, then what they rest on
        shown, *further = text.split(SECTION)
        figure = study.figures / "isoflop.png"
        print(f"\n{fits['answer']}\n" + f"Figure 1: {relative(figure)}\n" * figure.is_file())
        print("\n".join(shown.splitlines()[4:]))
        if further:
            titles = "; ".join(section.partition("\n")[0] for section in further)
            print(f"\nFurther tables in {relative(study.table)}: {titles}")
    else:
        print(text, end="")
    return 0


def relative(path: Path) -> Path:
    """The path as seen from the checkout, where it lies in it."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


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
    header = ("budget", "method", "sizes", "optimal FLOPs per token", "loss there", "with its own curvature",
              "difference to dense [95 %]", "flags")  # fmt: skip
    return [
        *markdown(header, rows),
        "",
        "Validation losses in nats per token at the compute optimum: the minimum of one fit a budget of all methods, "
        "with one curvature in the logarithm of FLOPs per token, over one window of sizes; beside it with a curvature "
        "for each method. Intervals are Student's and hold the misfit of sizes, seeds and the sampling of validation "
        "sequences. They leave out the choice of learning rates. A minimum outside the sampled sizes (outside range), "
        "of a fit that does not open upwards (curvature) or of fewer than four sizes (too few) has no number; one in "
        f"the outer fifth of the sizes is flagged (off centre). FLOPs: {listed(runs['convention'])}.",
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
            "Standard errors in nats per token. Of sizes: what the curves do not describe, an effect that the seeds of "
            "a size share; without a second seed at any size it holds seeds too. Of sequences: sampling of the "
            "validation set, paired between methods. Of rates: where the study brackets them, else left out. Last: the "
            "difference if each method has its own curvature.",
        )
    if claims := fits["claims"]:
        rows = [
            [budget_name(c["budget"]), f"{label(c['method'])} minus {label(c['rival'])}", signed_interval(c),
             number(c["p"], "{:.4f}"), number(c["p_holm"], "{:.4f}")]
            for c in claims
        ]  # fmt: skip
        lines += section(
            "Claims",
            markdown(["budget", "comparison", "difference [95 %]", "p", "p, corrected"], rows),
            f"Two-sided t tests; corrected by Holm's method for the {len(rows)} comparisons of this table. A lead is "
            "claimed below 0.05.",
        )
    if multipliers := tables.multiplier_lines(fits):
        slopes = [
            f"{label(g['method'])} {with_interval(g['slope'], (g['low'], g['high']), '{:+.3f}')}"
            for g in fits["growth"]
        ]
        grows = f"Slope of its logarithm per factor of ten in the budget: {', '.join(slopes)}." if slopes else (
            "No growth is claimed: that needs four budgets."
        )  # fmt: skip
        lines += section(
            "Compute multiplier",
            multipliers,
            "Dense's FLOPs over the FLOPs that the method needs for the same loss, both interpolated between the "
            "budgets; intervals from a joint bootstrap of all budgets.",
            grows,
        )
    ours, theirs = tables.perplexities(fits, str(runs["val_set"].iloc[0])), tables.paper_perplexities(published)
    if ours.empty:
        return lines
    absent = [name for name in theirs.columns if name not in ("budget", "name", "gap") and f"ppl_{name}" not in runs]
    lines += section(
        "Perplexity at the compute optimum (the paper's table 1)",
        tables.perplexity_lines(ours),
        "Of each evaluation set, at the minimum of the validation loss over FLOPs per token; last column: distance to "
        "dense in nats per token.",
        f"The paper's table 1. Of its sets {', '.join(absent)} are absent here; its tokenizer and data are others, so "
        "that only distances compare, the last column on c4.",
    )
    lines += [*tables.perplexity_lines(theirs), ""]
    if exponents := tables.exponent_lines(fits):
        lines += section(
            "The compute optimum by three approaches",
            exponents,
            "Exponents of the optimal FLOPs per token in the budget [95 %, bootstrap]. 1: of the lowest curve at each "
            "compute, in mid-run before the learning rate has decayed; 2: of the fitted minima; 3: of the surface "
            "loss = E + A / N^alpha + B / D^beta through all runs. Last: the mean loss of the largest budget's runs, "
            "as a surface through the smaller budgets predicts it. All coefficients: fits.json.",
        )
    elif runs["budget"].nunique() < 3:
        lines += ["No exponents: they need three budgets.", ""]
    if conventions := tables.convention_lines(fits):
        lines += section(
            "Ranking under other FLOP conventions",
            conventions,
            "Compute multiplier and, in brackets, the rank at the budget. Losses at the optimum are those above; what "
            "they cost is counted anew by each convention; — where it would be extrapolated.",
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
            f"{row['size']}, {budget_name(row['budget'])}", label(row["name"]), str(row["seeds"]), f"{row['mean']:.4f}",
            f"{np.exp(row['mean']):.2f}", difference(differences.get((row["budget"], row["size"], row["name"]))),
            number(row["layer_share"], "{:.1%}"), number(row["expert_usage"], "{:.1%}"), number(row["unevenness"]),
        ]
        for row in variants.merge(others, how="left").to_dict("records")
    ]  # fmt: skip
    header = ("at", "method", "seeds", "loss", "perplexity", "difference to dense [95 %]", "layer's FLOPs", "usage",
              "unevenness")  # fmt: skip
    return [
        *markdown(header, rows),
        "",
        "Validation losses in nats per token, means over seeds. Intervals hold the sampling of validation sequences "
        "and, where there are several, seeds, whose scatter is pooled over the rows. With one seed they leave seeds "
        "out (sequences only), which elsewhere scatter by 0.004 to 0.010: such a difference alone claims nothing. "
        f"FLOPs: {listed(runs['convention'])}.",
        "",
        *([f"- {missing_note(runs)}.", ""] if missing_note(runs) else []),
    ]


def experts_and_norm(runs: pd.DataFrame, fits: Fits, published: pd.DataFrame) -> list[str]:
    """The paper's table 2 beside ours, and what BatchNorm changes."""
    lines = section(
        "Experts and BatchNorm on the queries (the paper's table 2)",
        tables.norm_lines(tables.experts_by_norm(runs, published)),
        "Pairs: without / with BatchNorm. Usage and unevenness by the paper's definitions (section 3.3), ours over "
        f"{listed(runs['usage_tokens'])} tokens.",
    )
    pairs = [
        [label(found["method"]), difference(found)]
        for entry in fits["budgets"]
        for found in entry["differences"]
        if "query_norm=true" in found["method"] and "query_norm=false" in found["reference"]
    ]
    if pairs:
        table = markdown(["with BatchNorm", "loss minus that without [95 %]"], pairs)
        lines += section("What BatchNorm on the queries changes", table)
    return lines


def best_rates(fits: Fits) -> list[str]:
    """The best rate of each method and size, and methods compared at their best rates."""
    best = [
        [budget_name(b["budget"]), b["size"], label(b["method"]), number(b["rate"], "{:.3g}"),
         number(b["loss"], "{:.4f}"), f"{b['best_tried']['rate']:g}", f"{b['best_tried']['loss']:.4f}",
         b["status"].replace("_", " ")]
        for b in fits["rates"]["best"]
    ]  # fmt: skip
    if not best:
        return []
    names = ("budget", "size", "method", "best rate, fitted", "loss there", "best tried", "its loss", "status")
    lines = section(
        "Best rates",
        markdown(names, best),
        "The minimum of a parabola in the logarithm of the rate, with one curvature for all methods and sizes of a "
        "budget, through the rates near the best one tried.",
    )
    pairs = [
        [budget_name(d["budget"]), d["size"], label(d["method"]), signed_interval(d)]
        for d in fits["rates"]["differences"]
    ]
    if pairs:
        header = ("budget", "size", "method", "difference to dense, each at its best rate [95 %]")
        lines += section(
            "Methods at their best rates",
            markdown(header, pairs),
            "The interval holds the scatter about the parabolas. One seed tried all rates of a model, so it leaves "
            "seeds out.",
        )
    return lines


def rates(runs: pd.DataFrame) -> list[str]:
    """The settings of a learning-rate study, best first."""
    val_sets = listed(runs["val_set"])
    lines = [f"Losses in nats per token on the {val_sets} set; rates as set, before the rule for the width.", ""]
    for name, rows in settings_table(runs).groupby("name", sort=False):
        shown = rows.drop(columns="name")
        texts = [[f"{value:.4g}" for value in row] for row in shown.itertuples(index=False)]
        lines += section(label(str(name)), markdown(shown.columns, texts), *(f"- {edge}" for edge in edges(rows)))
    return lines


if __name__ == "__main__":
    sys.exit(exit_code(main))
