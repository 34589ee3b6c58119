"""The tables of a study, the paper's beside them, and, in plain sentences, what it says of PEER.

    python analysis/table.py SWEEP

What the study varies decides which: losses at the compute optimum, perplexities there (the paper's table 1) and
rankings under other FLOP conventions; a layer's settings at one size, and experts and BatchNorm (table 2); rates.

Works on runs/SWEEP/study, else on results/SWEEP; prints the tables and writes them to table.md there.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from peerscale.errors import UserError, exit_code
from peerscale.files import write_text
from peerscale.laws.isoflop import MIN_BUDGETS, VertexStatus
from peerscale.runs.study import Study, find_study, method_names, read_fits, study_parser, usable
from peerscale.runs.table import DIFFERENCES, read_runs, read_table
from peerscale.sweeper import budget_name
from peerscale.viz.ablations import has_curves, over_seeds, varied
from peerscale.viz.isoflop import missing_note
from peerscale.viz.published import read_published
from peerscale.viz.rates import edges, settings_table
from peerscale.viz.style import label, ordered
from peerscale.viz.tables import (
    convention_lines,
    experts_by_norm,
    markdown,
    multipliers_by_convention,
    norm_lines,
    number,
    paper_perplexities,
    perplexities,
    perplexity_lines,
)

LARGER_STUDY = "sweeps/isoflop_cpu.yaml"

HEADER = (
    "budget", "method", "sizes", "loss at the optimum, by FLOPs per token", "by total parameters", "best cell",
    "difference to dense [95 %]", "flags",
)  # fmt: skip

DISTANCE = "distance to dense in nats per token"

FLAGS = {
    VertexStatus.TOO_FEW: "fewer than five sizes",
    VertexStatus.CURVATURE: "no minimum, the parabola is flat or opens downwards",
    VertexStatus.OUTSIDE_RANGE: "minimum outside the sampled sizes",
    VertexStatus.OFF_CENTRE: "minimum in the outer fifth of the sampled sizes",
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = study_parser(__doc__).parse_args(argv)
    study = find_study(arguments.sweep, arguments.runs, arguments.results)
    runs = read_runs(study.runs)
    settings, published = varied(runs), read_published()
    lines: list[str] = []
    if has_curves(runs) or not settings:
        fits, differences = read_fits(study.fits), read_differences(study)
        lines += [report(arguments.sweep, runs, fits, differences), *at_the_optimum(runs, fits, published)]
    elif settings & {"lr", "table_lr"}:
        lines += [f"# {arguments.sweep}: learning rates, best first", "", *rates(runs)]
    else:
        lines += [f"# {arguments.sweep}: settings at one size", "", *settings_lines(runs, read_differences(study))]
    if settings & {"n_experts", "query_norm"}:
        lines += experts_and_norm(runs, published)
    text = "\n".join(lines)
    write_text(study.table, text)
    print(text, end="")
    return 0


def read_differences(study: Study) -> pd.DataFrame:
    if not study.differences.is_file():
        raise UserError(f"{study.differences} is not there; first: python analysis/collect.py {study.sweep}")
    return read_table(study.differences, DIFFERENCES)


def at_the_optimum(runs: pd.DataFrame, fits: Mapping[str, Mapping[str, Any]], published: pd.DataFrame) -> list[str]:
    """The paper's table 1, ours and theirs, and rankings under other conventions."""
    ours = perplexities(runs, fits)
    if ours.empty:
        return []
    sets = [column.removeprefix("ppl_") for column in runs.columns if column.startswith("ppl_")]
    theirs = paper_perplexities(published)
    absent = [name for name in theirs.columns if name not in ("budget", "name", "gap", *sets)]
    lines = [
        "## Perplexity at the compute optimum (the paper's table 1)",
        "",
        *perplexity_lines(ours),
        "",
        f"Of each evaluation set, at the minimum of the validation loss over FLOPs per token; last column: {DISTANCE}. "
        "†: flagged minimum.",
        "",
        f"The paper's table 1. Of its sets {', '.join(absent)} are absent here; its tokenizer and data are others, so "
        "that only distances compare, the last column on c4.",
        "",
        *perplexity_lines(theirs),
        "",
    ]
    multipliers = multipliers_by_convention(runs, fits)
    if multipliers["as counted"].notna().any():
        lines += [
            "## Ranking under other FLOP conventions",
            "",
            *convention_lines(multipliers),
            "",
            "How many times a method's compute dense needs for the same loss and, in brackets, the rank at the budget. "
            "Losses at the optimum are those above; what they cost is counted anew by each convention. Beyond dense's "
            "budgets its loss is extrapolated. †: flagged minimum.",
            "",
        ]
    return lines


def settings_lines(runs: pd.DataFrame, differences: pd.DataFrame) -> list[str]:
    """A row for each arm of a study of one size, over its seeds."""
    named = runs.assign(name=method_names(runs), size_budget=runs["size"] + ", " + runs["budget"].map(budget_name))
    done = named[usable(named)]
    order = {name: i for i, name in enumerate(done["name"].unique())}  # the plan's, in which settings ascend
    means = over_seeds(done, ["size_budget", "budget", "name"]).sort_values("name", key=lambda c: c.map(order))
    rows = []
    for row in means.to_dict("records"):
        cells = done[(done["size_budget"] == row["size_budget"]) & (done["name"] == row["name"])]
        usage, unevenness = (cells[column].astype(float).mean() for column in ("expert_usage", "unevenness"))
        texts = [
            row["size_budget"], label(row["name"]), str(row["seeds"]), f"{row['mean']:.4f}",
            f"± {row['high'] - row['mean']:.4f}", f"{np.exp(row['mean']):.2f}",
            "reference" if row["name"] == "dense" else difference_text(row["name"], row["budget"], differences),
            f"{cells['layer_share'].mean():.1%}", number(usage, "{:.1%}"), number(unevenness),
        ]  # fmt: skip
        rows.append(texts)
    header = ["at", "method", "seeds", "loss", "±", "perplexity", "difference to dense [95 %]", "layer's FLOPs"]
    return [
        *markdown([*header, "usage", "unevenness"], rows),
        "",
        "Validation losses in nats per token; ±: half the 95 % interval of the mean over seeds, with one seed the "
        "standard error over validation sequences. The interval of the difference covers the sampling of those "
        f"sequences, not seeds. FLOPs: {', '.join(map(str, runs['convention'].unique()))}.",
        "",
        *([f"- {missing_note(runs)}.", ""] if missing_note(runs) else []),
    ]


def experts_and_norm(runs: pd.DataFrame, published: pd.DataFrame) -> list[str]:
    """The paper's table 2 beside ours."""
    counted = ", ".join(f"{n:,.0f}" for n in sorted(runs["usage_tokens"].dropna().unique()))
    return [
        "## Experts and BatchNorm on the queries (the paper's table 2)",
        "",
        *norm_lines(experts_by_norm(runs, published)),
        "",
        "Pairs: without / with BatchNorm. Worth: what BatchNorm takes off the loss in nats, ± half the 95 % interval "
        f"over seeds. Usage and unevenness by the paper's definitions (section 3.3), ours over {counted} tokens.",
        "",
    ]


def rates(runs: pd.DataFrame) -> list[str]:
    """The settings of a learning-rate study, best first."""
    val_sets = " and ".join(map(str, runs["val_set"].unique()))
    lines = [f"Losses in nats per token on the {val_sets} set; rates as set, before the rule for the width.", ""]
    for name, rows in settings_table(runs).groupby("name", sort=False):
        shown = rows.drop(columns="name")
        texts = [[f"{value:.4g}" for value in row] for row in shown.itertuples(index=False)]
        lines += [f"## {label(str(name))}", "", *markdown(map(str, shown.columns), texts), ""]
        lines += [f"- {edge}" for edge in edges(rows)] + [""] * bool(edges(rows))
    return lines


def report(sweep: str, runs: pd.DataFrame, fits: Mapping[str, Mapping[str, Any]], differences: pd.DataFrame) -> str:
    """The Markdown of the closing table and the sentences below it."""
    runs = runs.assign(name=method_names(runs))
    rows = [
        table_row(name, budget, runs, fits, differences)
        for budget in sorted(runs["budget"].unique())
        for name in ordered(runs.loc[runs["budget"] == budget, "name"])
    ]
    return "\n".join(
        [
            f"# {sweep}: losses at equal compute",
            "",
            *markdown(HEADER, rows),
            "",
            "Validation losses in nats per token. The optimum is the minimum of a parabola in the logarithm of size. "
            "The interval covers the sampling of validation sequences, not seeds nor the choice of learning rate. "
            f"FLOPs: {', '.join(map(str, runs['convention'].unique()))}.",
            "",
            *conclusions(runs, fits, differences),
            "",
        ]
    )


def table_row(
    name: str, budget: float, runs: pd.DataFrame, fits: Mapping[str, Mapping[str, Any]], differences: pd.DataFrame
) -> list[str]:
    """One method at one budget."""
    planned = runs[(runs["name"] == name) & (runs["budget"] == budget)]
    done = planned[usable(planned)]
    vertex, by_total = (vertex_of(fits.get(key), budget) for key in (name, f"{name}/params_total"))
    counts = planned.loc[~usable(planned), "status"].value_counts().sort_index()
    flags = [f"{n} {status}" for status, n in counts.items()]
    if vertex and vertex["status"] != VertexStatus.OK:
        flags.append(FLAGS[VertexStatus(vertex["status"])])
    if by_total and by_total["status"] not in (VertexStatus.OK, vertex and vertex["status"]):
        flags.append(f"by total parameters: {FLAGS[VertexStatus(by_total['status'])]}")
    best = done.loc[done["val_loss"].idxmin()] if len(done) else None
    return [
        budget_name(budget),
        label(name),
        f"{done['size'].nunique()} of {planned['size'].nunique()}",
        loss_text(vertex),
        loss_text(by_total),
        "—" if best is None else f"{best['size']}: {best['val_loss']:.4f}",
        "reference" if name == "dense" else difference_text(name, budget, differences),
        "; ".join(flags) or "—",
    ]


def conclusions(runs: pd.DataFrame, fits: Mapping[str, Mapping[str, Any]], differences: pd.DataFrame) -> list[str]:
    """A sentence per budget on PEER, and one on exponents; a list in Markdown."""
    budgets = sorted(runs["budget"].unique())
    against = differences[differences["reference"] == "peer"]
    lines, leads = [], []
    for budget in budgets if (runs["method"] == "peer").any() else ():
        noise = scatter(budget, runs.assign(name=method_names(runs)), fits)
        line, lead = verdict(budget, against[against["budget"] == budget], noise)
        lines.append(line)
        leads.append(lead)
    if not all(leads):
        lines.append(f"A larger study, where PEER's lead may show or not, is `{LARGER_STUDY}`.")
    exponents = {
        fit["method"]: fit["exponent"] for key, fit in fits.items() if key == fit["method"] and fit["exponent"]
    }
    if exponents:
        each = ", ".join(f"{label(name)} {exponents[name]:.3f}" for name in ordered(exponents))
        lines.append(f"Exponents of the optimal FLOPs per token in the budget: {each}.")
    else:
        lines.append(
            f"No scaling exponent is fitted from {len(budgets)} budget{'s' * (len(budgets) != 1)}"
            + (f": a power law wants {MIN_BUDGETS}." if len(budgets) < MIN_BUDGETS else ", as minima are flagged.")
        )
    return [f"- {line}" for line in lines]


def scatter(budget: float, runs: pd.DataFrame, fits: Mapping[str, Mapping[str, Any]]) -> float:
    """Standard deviation of the points of a budget about their methods' parabolas, nats; 0 where none can be told.

    It holds what the interval does not: seeds, and what a parabola misses.
    """
    squares, freedom = 0.0, 0
    rows = runs[usable(runs) & (runs["budget"] == budget)]
    for name, points in rows.groupby("name"):
        vertex = vertex_of(fits.get(str(name)), budget)
        if vertex and vertex["coefficients"] and len(points) > 3:
            curve = np.polynomial.Polynomial(vertex["coefficients"])(np.log10(points["flops_per_token"]))
            squares += float(((points["val_loss"] - curve) ** 2).sum())
            freedom += len(points) - 3
    return (squares / freedom) ** 0.5 if freedom else 0.0


def verdict(budget: float, others: pd.DataFrame, noise: float = 0.0) -> tuple[str, bool]:
    """Whether PEER's loss lies below every other method's, as a sentence and as a truth value.

    A lead counts if the 95 % interval leaves out zero and it is larger than the scatter of the points.

    Args:
        budget: of the rows.
        others: each other method's difference to PEER.
        noise: the scatter of the points about their curves, nats.
    """
    at = budget_name(budget)
    if others["difference"].isna().all():
        why = "; ".join(dict.fromkeys(others["note"].dropna())) or "no finished cells to compare"
        return f"Whether PEER leads at {at} is unknown: {why}.", False
    beaten, unbeaten = [], []
    for name in ordered(others["method"]):
        row = others[others["method"] == name].iloc[0]
        if pd.isna(row["difference"]):
            unbeaten.append(f"unknown against {label(name)}")
            continue
        difference, half = -row["difference"], (row["high"] - row["low"]) / 2
        amount = f"{signed(difference)} ± {half:.3f}" if pd.notna(half) else f"{signed(difference)} (no interval)"
        within = abs(difference) <= noise
        if pd.notna(half) and row["low"] > 0 and not within:
            beaten.append(f"{amount} nats to {label(name)}")
        else:
            unclear = ", within the scatter" if within else "" if row["high"] < 0 else ", no clear difference"
            unbeaten.append(f"{amount} nats {'over' if difference > 0 else 'to'} {label(name)}{unclear}")
    if unbeaten:
        line = f"PEER does not lead at {at}: {'; '.join(unbeaten)}"
        line += f". It leads the others: {'; '.join(beaten)}." if beaten else "."
    else:
        line = f"PEER leads at {at}: {'; '.join(beaten)}."
    if "within the scatter" in line:
        line += f" Points, of one seed each, scatter by {noise:.3f} nats about the curves."
    notes = dict.fromkeys(note for notes in others["note"].dropna() for note in str(notes).split("; "))
    return line + (f" Flagged: {'; '.join(map(in_words, notes))}." if notes else ""), not unbeaten


def difference_text(name: str, budget: float, differences: pd.DataFrame) -> str:
    rows = differences[
        (differences["reference"] == "dense") & (differences["method"] == name) & (differences["budget"] == budget)
    ]
    if rows.empty or rows["difference"].isna().all():
        return "—"
    row = rows.iloc[0]
    interval = "no interval" if pd.isna(row["low"]) else f"[{signed(row['low'])}, {signed(row['high'])}]"
    return f"{signed(row['difference'])} {interval}"


def vertex_of(fit: Mapping[str, Any] | None, budget: float) -> Mapping[str, Any] | None:
    return next((v for v in fit["vertices"] if v["budget"] == budget), None) if fit else None


def loss_text(vertex: Mapping[str, Any] | None) -> str:
    """The loss at a minimum; a dash where there is none."""
    return f"{vertex['loss']:.4f}" if vertex and vertex["x"] is not None else "—"


def in_words(note: str) -> str:
    """`moe: off_centre` as a table's reader can take it."""
    name, _, status = note.partition(": ")
    return f"{label(name)}: {FLAGS[VertexStatus(status)]}" if status in set(VertexStatus) else note


def signed(nats: float) -> str:
    return f"{nats:+.3f}".replace("-", "−")


if __name__ == "__main__":
    sys.exit(exit_code(main))
