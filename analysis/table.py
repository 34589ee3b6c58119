"""The tables of a study, the paper's beside them, and a sentence a budget on whether PEER leads.

    python analysis/table.py SWEEP

What the study varies decides which: losses at the compute optimum, perplexities there (the paper's table 1) and
rankings under other FLOP conventions; a layer's settings at one size, and experts and BatchNorm (table 2); rates.

Works on runs/SWEEP/study, else on results/SWEEP; writes the tables to table.md there and prints what decides.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from peerscale.errors import UserError, exit_code
from peerscale.files import write_text
from peerscale.laws.isoflop import VertexStatus
from peerscale.runs.fits import WITHIN
from peerscale.runs.study import Study, find_study, method_names, read_fits, study_parser, usable
from peerscale.runs.table import DIFFERENCES, read_runs, read_table
from peerscale.sweeper import budget_name
from peerscale.viz import tables
from peerscale.viz.ablations import has_curves, over_seeds, varied
from peerscale.viz.isoflop import missing_note
from peerscale.viz.published import read_published
from peerscale.viz.rates import edges, settings_table
from peerscale.viz.style import label, listed, ordered
from peerscale.viz.tables import Fits, markdown, number

LARGER_STUDY = "isoflop_cpu"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = study_parser(__doc__).parse_args(argv)
    study = find_study(arguments.sweep, arguments.runs, arguments.results)
    runs, published = read_runs(study.runs), read_published()
    runs, settings = runs.assign(name=method_names(runs)), varied(runs)
    compared = has_curves(runs) or not settings
    if compared:
        title, fits = "losses at equal compute", read_fits(study.fits)
        lines = [*closing_table(runs, fits, read_differences(study)), *at_the_optimum(runs, fits, published)]
    elif settings & {"lr", "table_lr"}:
        title, lines = "learning rates, best first", rates(runs)
    else:
        title, lines = "settings at one size", settings_lines(runs, read_differences(study))
    if settings & {"n_experts", "query_norm"}:
        lines += experts_and_norm(runs, published)
    text = "\n".join([f"# {arguments.sweep}: {title}", "", *lines])
    write_text(study.table, text)
    titles = [line.removeprefix("## ") for line in lines if line.startswith("## ")]
    if compared and titles:  # the answer, as the last thing on a terminal at the end of a study
        answer = text.partition("\n## ")[0]
        text = f"{answer}\nFurther tables in {study.table}: {'; '.join(titles)}\n"
    print(text, end="")
    return 0


def read_differences(study: Study) -> pd.DataFrame:
    if not study.differences.is_file():
        raise UserError(f"{study.differences} is not there; first: python analysis/collect.py {study.sweep}")
    return read_table(study.differences, DIFFERENCES)


def closing_table(runs: pd.DataFrame, fits: Fits, differences: pd.DataFrame) -> list[str]:
    """A row a budget and method, and below it what the study says of PEER and of exponents."""
    rows, verdicts = [], []
    for budget in sorted(runs["budget"].unique()):
        at_budget = runs[runs["budget"] == budget]
        for name in ordered(at_budget["name"]):
            mine = at_budget[at_budget["name"] == name]
            missing = mine.loc[~usable(mine), "status"].value_counts().sort_index()
            vertex, by_total = (vertex_of(fits.get(key), budget) for key in (name, f"{name}/params_total"))
            flags = [f"{n} {status}" for status, n in missing.items()]
            if vertex and vertex["status"] != VertexStatus.OK:
                flags.append(vertex["status"].replace("_", " "))
            if vertex and (left_out := mine.loc[usable(mine), "flops_per_token"].nunique() - len(vertex["sizes"])):
                flags.append(f"{left_out} left out")
            sizes = f"{mine.loc[usable(mine), 'size'].nunique()} of {mine['size'].nunique()}"
            rows.append([
                budget_name(budget), label(name), sizes,
                optimum(vertex), optimum(by_total), difference(name, budget, differences), "; ".join(flags) or "—",
            ])  # fmt: skip
        if (runs["method"] == "peer").any():
            others = differences[(differences["reference"] == "peer") & (differences["budget"] == budget)]
            verdicts.append(verdict(budget, others, scatter(at_budget, fits)))
    if any(not line.startswith("PEER leads") for line in verdicts) and LARGER_STUDY not in set(runs["sweep"]):
        verdicts.append(f"A larger study, at budgets up to 1e13, is `sweeps/{LARGER_STUDY}.yaml`.")
    exponents = {name: fits[name]["exponent"] for name in ordered(runs["name"]) if name in fits}
    each = ", ".join(f"{label(name)} {value:.3f}" for name, value in exponents.items() if value)
    verdicts.append(f"Exponents of the optimal FLOPs per token in the budget, from three budgets on: {each or 'none'}.")
    header = ("budget", "method", "sizes", "loss at the optimum, by FLOPs per token", "by total parameters",
              "difference to dense [95 %]", "flags")  # fmt: skip
    return [
        *markdown(header, rows),
        "",
        "Validation losses in nats per token. The optimum is the minimum of a parabola in the logarithm of size, "
        f"through the sizes within {100 * WITHIN:.0f} % of the lowest loss and at least five; the others are left out. "
        "The interval covers the sampling of validation sequences, not seeds nor the choice of learning rate. "
        "†, flags: fewer than five sizes (too few), a parabola that is flat or opens downwards (curvature), a minimum "
        "outside the sampled range or in its outer fifth (off centre). "
        f"FLOPs: {listed(runs['convention'])}.",
        "",
        *(f"- {line}" for line in verdicts),
        "",
    ]


def verdict(budget: float, others: pd.DataFrame, noise: float = 0.0) -> str:
    """Whether PEER's loss lies below every other method's: beyond the 95 % interval and the scatter of the points.

    Args:
        budget: of the rows.
        others: each other method's difference to PEER.
        noise: the scatter of the points about their curves, nats.
    """
    at, beaten, texts = budget_name(budget), [], []
    if others["difference"].isna().all():
        why = "; ".join(dict.fromkeys(others["note"].dropna())) or "no finished cells to compare"
        return f"Whether PEER leads at {at} is unknown: {why}."
    for row in others.set_index("method").loc[ordered(others["method"])].reset_index().to_dict("records"):
        name, lead, half = label(row["method"]), row["difference"], (row["high"] - row["low"]) / 2
        beaten += [name] if row["low"] > 0 and lead > noise else []
        texts.append(f"{number(-lead, '{:+.3f}')} ± {number(half, '{:.3f}')} nats to {name}")
    leads = len(beaten) == len(texts)
    but = f", though over {', '.join(beaten)}" if beaten and not leads else ""
    line = f"PEER {'leads' if leads else 'does not lead'} at {at}{but}: {'; '.join(texts)}."
    return line + (f" Points scatter by {noise:.3f} nats about the curves; less is no lead." if noise else "")


def scatter(runs: pd.DataFrame, fits: Fits) -> float:
    """Standard deviation of a budget's points about their methods' parabolas, nats; 0 where none can be told.

    It holds what the interval does not: seeds, and what a parabola misses.
    """
    squares, freedom = 0.0, 0
    for name, points in runs[usable(runs)].groupby("name"):
        vertex = vertex_of(fits.get(str(name)), points["budget"].iloc[0])
        points = points[points["flops_per_token"].isin(vertex["sizes"] if vertex else ())]
        if vertex and len(points) > 3 and None not in vertex["coefficients"]:
            curve = np.polynomial.Polynomial(vertex["coefficients"])(np.log10(points["flops_per_token"]))
            squares += float(((points["val_loss"] - curve) ** 2).sum())
            freedom += len(points) - 3
    return (squares / freedom) ** 0.5 if freedom else 0.0


def difference(name: str, budget: float, differences: pd.DataFrame) -> str:
    if name.partition(" ")[0] == "dense":
        return "reference"
    chosen = (differences["reference"] == "dense") & (differences["budget"] == budget)
    rows = differences[chosen & (differences["method"] == name)].dropna(subset="difference")
    if rows.empty:
        return "—"
    middle, *ends = (number(value, "{:+.3f}") for value in rows.iloc[0][["difference", "low", "high"]])
    return f"{middle} [{'none' if '—' in ends else ', '.join(ends)}]"


def vertex_of(fit: Mapping[str, Any] | None, budget: float) -> Mapping[str, Any] | None:
    return next((v for v in fit["vertices"] if v["budget"] == budget), None) if fit else None


def optimum(vertex: Mapping[str, Any] | None) -> str:
    """The loss at a minimum, with a dagger if it is flagged; a dash where there is none."""
    if not vertex or vertex["x"] is None:
        return "—"
    return f"{vertex['loss']:.4f}" + " †" * (vertex["status"] != VertexStatus.OK)


def section(title: str, table: Sequence[str], *notes: str) -> list[str]:
    return [f"## {title}", "", *table, "", *(line for note in notes for line in (note, ""))]


def at_the_optimum(runs: pd.DataFrame, fits: Fits, published: pd.DataFrame) -> list[str]:
    """The paper's table 1, ours and theirs, and rankings under other conventions."""
    ours, theirs = tables.perplexities(runs, fits), tables.paper_perplexities(published)
    if ours.empty:
        return []
    absent = [name for name in theirs.columns if name not in ("budget", "name", "gap") and f"ppl_{name}" not in runs]
    lines = section(
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
            "compute, in mid-run before the learning rate has decayed; 2: of the parabolas' minima; 3: of the "
            "surface loss = E + A / N^alpha + B / D^beta through all runs. Last: the mean loss of the largest budget's "
            "runs, as a surface through the smaller budgets predicts it. All coefficients: fits.json.",
        )
    multipliers = tables.multipliers_by_convention(runs, fits)
    if multipliers["as counted"].notna().any():
        lines += section(
            "Ranking under other FLOP conventions",
            tables.convention_lines(multipliers),
            "How many times a method's compute dense needs for the same loss and, in brackets, the rank at the budget. "
            "Losses at the optimum are those above; what they cost is counted anew by each convention. Beyond dense's "
            "budgets its loss is extrapolated.",
        )
    return lines


def settings_lines(runs: pd.DataFrame, differences: pd.DataFrame) -> list[str]:
    """A row for each arm of a study of one size, over its seeds."""
    done = runs[usable(runs)]
    order = {name: i for i, name in enumerate(done["name"].unique())}  # the plan's, in which settings ascend
    arms = over_seeds(done, ["size", "budget", "name"]).sort_values("name", key=lambda names: names.map(order))
    columns = ["layer_share", "expert_usage", "unevenness"]
    others = done.groupby(["size", "budget", "name"], as_index=False)[columns].mean()
    rows = [
        [
            f"{row['size']}, {budget_name(row['budget'])}", label(row["name"]), str(row["seeds"]), f"{row['mean']:.4f}",
            f"± {row['high'] - row['mean']:.4f}", f"{np.exp(row['mean']):.2f}",
            difference(row["name"], row["budget"], differences), number(row["layer_share"], "{:.1%}"),
            number(row["expert_usage"], "{:.1%}"), number(row["unevenness"]),
        ]
        for row in arms.merge(others, how="left").to_dict("records")
    ]  # fmt: skip
    header = ("at", "method", "seeds", "loss", "±", "perplexity", "difference to dense [95 %]", "layer's FLOPs",
              "usage", "unevenness")  # fmt: skip
    return [
        *markdown(header, rows),
        "",
        "Validation losses in nats per token; ±: half the 95 % interval of the mean over seeds, with one seed the "
        "standard error over validation sequences. The interval of the difference covers the sampling of those "
        f"sequences, not seeds. FLOPs: {listed(runs['convention'])}.",
        "",
        *([f"- {missing_note(runs)}.", ""] if missing_note(runs) else []),
    ]


def experts_and_norm(runs: pd.DataFrame, published: pd.DataFrame) -> list[str]:
    """The paper's table 2 beside ours."""
    return section(
        "Experts and BatchNorm on the queries (the paper's table 2)",
        tables.norm_lines(tables.experts_by_norm(runs, published)),
        "Pairs: without / with BatchNorm. Usage and unevenness by the paper's definitions (section 3.3), ours over "
        f"{listed(runs['usage_tokens'])} tokens.",
    )


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
