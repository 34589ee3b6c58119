"""The closing table of a study and, in plain sentences, what it says of PEER.

    python analysis/table.py SWEEP

Works on runs/SWEEP/study, else on results/SWEEP; prints the table and writes it to table.md there.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from peerscale.errors import UserError, exit_code
from peerscale.files import write_text
from peerscale.laws.isoflop import MIN_BUDGETS, VertexStatus
from peerscale.runs.study import find_study, method_names, read_json, study_parser, usable
from peerscale.runs.table import read_runs
from peerscale.sweeper import budget_name
from peerscale.viz.style import label, ordered

LARGER_STUDY = "sweeps/isoflop_cpu.yaml"

HEADER = (
    "budget", "method", "sizes", "loss at the optimum, by FLOPs per token", "by total parameters", "best cell",
    "difference to dense [95 %]", "flags",
)  # fmt: skip

FLAGS = {
    VertexStatus.TOO_FEW: "fewer than five sizes",
    VertexStatus.CURVATURE: "no minimum, the parabola is flat or opens downwards",
    VertexStatus.OUTSIDE_RANGE: "minimum outside the sampled sizes",
    VertexStatus.OFF_CENTRE: "minimum in the outer fifth of the sampled sizes",
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = study_parser(__doc__).parse_args(argv)
    study = find_study(arguments.sweep, arguments.runs, arguments.results)
    if not study.differences.is_file():
        raise UserError(f"{study.differences} is not there; first: python analysis/collect.py {arguments.sweep}")
    runs, fits, differences = read_runs(study.runs), read_json(study.fits), pd.read_csv(study.differences)
    text = report(arguments.sweep, runs, fits, differences)
    write_text(study.table, text)
    print(text, end="")
    return 0


def report(sweep: str, runs: pd.DataFrame, fits: Mapping[str, Mapping[str, Any]], differences: pd.DataFrame) -> str:
    """The Markdown of the closing table and the sentences below it."""
    runs = runs.assign(name=method_names(runs))
    rows = [
        table_row(name, budget, runs, fits, differences)
        for budget in sorted(runs["budget"].unique())
        for name in ordered(runs.loc[runs["budget"] == budget, "name"])
    ]
    lines = [HEADER, ["---"] * len(HEADER), *rows]
    return "\n".join(
        [
            f"# {sweep}: losses at equal compute",
            "",
            *(f"| {' | '.join(cells)} |" for cells in lines),
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
