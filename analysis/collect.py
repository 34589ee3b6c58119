"""From the records of a study to its tables and fits: runs.csv, records.jsonl, curves.csv, fits.json, differences.csv.

    python analysis/collect.py SWEEP [--with-published]

Reads the cells in runs/SWEEP, or results/SWEEP where there are none, or both; writes runs/SWEEP/study. Every planned
cell has a row, also those that were dropped, failed, or never run.
"""

import itertools
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from peerscale.errors import UserError, exit_code
from peerscale.files import write_json, write_text
from peerscale.laws.bootstrap import percentile_interval, resampled_losses
from peerscale.laws.isoflop import VertexStatus, fit_parabolas, minima
from peerscale.outcomes import further_line, of_the_plan, read_published, which_counts
from peerscale.runs.fits import fit_study
from peerscale.runs.record import Record, Status
from peerscale.runs.study import PlannedCell, collected, method_names, planned_record, published, study_parser, usable
from peerscale.runs.table import CURVES, curves_table, read_records, read_table, runs_table
from peerscale.sweeper import planned_cells

REFERENCES = ("dense", "peer")
"""Methods that the others are compared with."""

RARE = 0.05
"""Share of resamples without a minimum from which an interval is flagged."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = study_parser(__doc__)
    parser.add_argument("--with-published", action="store_true", help="add the published cells that were not run here")
    arguments = parser.parse_args(argv)
    table = published(arguments.sweep, arguments.results)
    if table.runs.is_file() and not table.records.is_file() and not read_records(arguments.runs / arguments.sweep):
        print(f"{arguments.sweep}: published without its records, so there is nothing to fit again: {table.runs}")
        return 0
    read = read_study(arguments.sweep, arguments.runs, arguments.results, with_published=arguments.with_published)
    records, study = [*read.planned, *read.further], collected(arguments.sweep, arguments.runs)
    runs = runs_table(records)
    fits = fit_study(runs, read.curves)
    write_text(study.runs, runs.to_csv(index=False))
    write_text(study.records, "".join(json.dumps(asdict(record)) + "\n" for record in records))
    write_text(study.curves, read.curves.to_csv(index=False))
    write_json(study.fits, fits)
    write_text(study.differences, compare(runs, records, fits).round(6).to_csv(index=False))
    counts = Counter(record.status for record in read.planned)
    states = ", ".join(f"{n} {status}" for status, n in counts.items())
    print(f"{arguments.sweep}: {len(read.planned)} cells ({states}), from {read.source} -> {study.folder}")
    if read.further:
        print(f"{further_line([record.cell for record in read.further])}; they are in the table and the fits too")
    missed = sum(record.cell in read.left_out and record.status is not Status.DONE for record in read.planned)
    if missed:
        print(f"{missed} of them are finished in {table.folder}: make figures SWEEP={arguments.sweep} PUBLISHED=1")
    return 0
    read = read_study(arguments.sweep, arguments.runs, arguments.results, with_published=arguments.with_published)
    records, study = [*read.planned, *read.further], collected(arguments.sweep, arguments.runs)
    runs = runs_table(records)
    fits = fit_study(runs, read.curves)
    write_text(study.runs, runs.to_csv(index=False))
    write_text(study.records, "".join(json.dumps(asdict(record)) + "\n" for record in records))
    write_text(study.curves, read.curves.to_csv(index=False))
    write_json(study.fits, fits)
    write_text(study.differences, compare(runs, records, fits).round(6).to_csv(index=False))
    counts = Counter(record.status for record in read.planned)
    states = ", ".join(f"{n} {status}" for status, n in counts.items())
    print(f"{arguments.sweep}: {len(read.planned)} cells ({states}), from {read.source} -> {study.folder}")
    if read.further:
        print(f"{further_line([record.cell for record in read.further])}; they are in the table and the fits too")
    if missed := [
        record for record in read.planned if record.cell in read.left_out and record.status is not Status.DONE
    ]:
        print(f"{len(missed)} of them are finished in {table.folder}: make figures SWEEP={arguments.sweep} PUBLISHED=1")
    return 0


class StudyRecords(NamedTuple):
    """All that is known of a study."""

    planned: list[Record]
    """In the order of the plan, one for each cell of it."""
    further: list[Record]
    """Of cells that the plan does not have."""
    curves: pd.DataFrame
    source: str
    """Where the records come from, in words."""
    left_out: set[str]
    """Published finished cells, by name, that were not asked for."""


def read_study(sweep: str, runs: Path, results: Path, *, with_published: bool = False) -> StudyRecords:
    """Records of all cells, planned ones included, and the training curves; from `runs`, else as published.

    With `with_published` both are read. A published cell counts where `runs` has no finished one of its name, unless
    its configuration is not the plan's.

    Raises:
        UserError: there are none, or the published ones are of another corpus or recipe.
    """
    here, source = runs / sweep, published(sweep, results)
    own = {record.cell: record for record in read_records(here)}
    if not source.records.is_file() and (with_published or not own):
        raise UserError(f"no runs of {sweep!r}: neither cells in {here} nor {source.records}")
    cells = plan_of(sweep)
    there = read_published(source)
    same, notices = of_the_plan(cells or (), there, source.folder, None)
    if own and not with_published:
        finished = {name for name, record in same.items() if record.status is Status.DONE}
        curves = curves_table(here / cell for cell in own)
        return StudyRecords(*with_planned(sweep, cells, own), curves, str(here), finished)
    if own:
        refuse_incomparable([*own.values()], [*there.values()], source.records)
        there = same
    for notice in notices:
        print(notice, file=sys.stderr)
    counting = {name: which_counts(own.get(name), there.get(name)) for name in {**own, **there}}
    found = {name: record for name, record in counting.items() if record is not None}
    run_here = [name for name in found if found[name] is own.get(name)]
    n_published = len(found) - len(run_here)
    words = f"{len(run_here)} cells of {here}, {n_published} of {source.folder}" if own else str(source.folder)
    curves = read_table(source.curves, CURVES) if source.curves.is_file() else curves_table(())
    if run_here:
        own_curves = curves_table(here / cell for cell in run_here)
        curves = pd.concat([own_curves, curves[~curves["cell"].isin(run_here)]], ignore_index=True)
    return StudyRecords(*with_planned(sweep, cells, found), curves, words, set())


def refuse_incomparable(own: Sequence[Record], others: Sequence[Record], where: Path) -> None:
    """Raise `UserError` unless all finished cells were trained by one recipe on one corpus."""
    for key in ("recipe_version", "data_fingerprint"):
        here, there = ({r.science[key] for r in records if r.status is Status.DONE} for records in (own, others))
        if here and there and here != there:
            raise UserError(f"{where}: {key} {_listed(there)}, but the cells run here have {_listed(here)}")


def _listed(values: set[Any]) -> str:
    return ", ".join(sorted(map(str, values)))


def plan_of(sweep: str) -> Sequence[PlannedCell] | None:
    """The cells of the study's file; None, with a notice, where it cannot be read."""
    try:
        return planned_cells(sweep)
    except UserError as error:
        notice = "notice: only cells with a record are in the table, as the plan cannot be read"
        print(f"{notice}: {error}", file=sys.stderr)
        return None


def with_planned(
    sweep: str, cells: Sequence[PlannedCell] | None, found: Mapping[str, Record]
) -> tuple[list[Record], list[Record]]:
    """A record for each cell of the plan, in its order, made where there is none; and those of no cell of the plan."""
    if cells is None:
        return [*found.values()], []
    planned = [found.get(cell.name) or planned_record(sweep, cell) for cell in cells]
    names = {cell.name for cell in cells}
    return planned, [record for name, record in found.items() if name not in names]


def compare(runs: pd.DataFrame, records: Sequence[Record], fits: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Differences of the loss at the compute optimum, fitted over FLOPs per token, between pairs of methods.

    Where a study has an axis common to both, such as the batch, each is compared at its own value of it. Two methods of
    one and the same size, as in a study of a layer's settings, are compared at that size, and flagged.
    The interval covers the sampling of validation sequences, the same resample for every cell, not seeds nor the
    choice of learning rate; each resample refits every method's parabola.

    Returns:
        One row per budget, reference and method: budget, method, reference, difference, low, high (nats per token;
        NaN where there is none), resamples, without_minimum, flagged, note.
    """
    runs = runs.assign(name=method_names(runs))
    runs = runs[usable(runs)]
    losses = _sequence_losses(records, set(runs["cell"]))
    draws = pd.DataFrame(resampled_losses(np.array([*losses.values()])) if losses else [], columns=[*losses])
    rows = []
    for budget in sorted(runs["budget"].unique()):
        at_budget = runs[runs["budget"] == budget]
        levels = {str(name): _level(cells, fits[name], draws) for name, cells in at_budget.groupby("name", sort=False)}
        for reference, name in itertools.product(REFERENCES, levels):
            same_arm = reference + name.removeprefix(name.partition(" ")[0])
            other = same_arm if same_arm in levels else reference
            if other in levels and other != name:
                difference = _difference(levels[name], levels[other])
                rows.append({"budget": budget, "method": name, "reference": reference, **difference})
    columns = "budget method reference difference low high resamples without_minimum flagged note"
    return pd.DataFrame(rows, columns=columns.split())


def _sequence_losses(records: Sequence[Record], cells: set[str]) -> dict[str, list[float]]:
    """Per-sequence losses by cell, of those evaluated on the same sequences as most."""
    losses = {r.cell: r.sequence_losses for r in records if r.cell in cells and np.isfinite(r.sequence_losses).all()}
    lengths = [len(values) for values in losses.values() if values]
    usual = max(lengths, key=lengths.count, default=0)
    return {cell: values for cell, values in losses.items() if values and len(values) == usual}


class Level(NamedTuple):
    """What a method reaches at a budget."""

    loss: float | None
    """At its optimum, or of its only size; None if it has neither."""
    size: str
    """Its only size; empty if it has several."""
    note: str
    """Why the loss is flagged; empty if it is not."""
    resampled: np.ndarray
    """The loss in each resample of the validation sequences; NaN if they are missing."""


def _level(cells: pd.DataFrame, fit: Mapping[str, Any], draws: pd.DataFrame) -> Level:
    name, budget, sizes = cells["name"].iloc[0], cells["budget"].iloc[0], cells["size"].unique()
    vertex = next(vertex for vertex in fit["vertices"] if vertex["budget"] == budget)
    note = "" if vertex["status"] == VertexStatus.OK else f"{name}: {vertex['status']}"
    cells = cells[cells["flops_per_token"].isin(vertex["sizes"])]
    drawn = np.asarray(draws.reindex(columns=cells["cell"]), float)
    if len(sizes) == 1:  # seeds of one model
        return Level(cells["val_loss"].mean(), sizes[0], note, drawn.mean(axis=1))
    _, resampled = minima(fit_parabolas(np.asarray(cells["flops_per_token"], float), drawn))
    return Level(vertex["loss"], "", note, resampled)


def _difference(method: Level, reference: Level) -> dict[str, Any]:
    notes = [level.note for level in (method, reference) if level.note]
    row: dict[str, Any] = {}
    if method.size == reference.size and method.loss is not None and reference.loss is not None:
        row["difference"] = method.loss - reference.loss
        resampled = method.resampled - reference.resampled
        n, missing = len(resampled), int(np.sum(np.isnan(resampled)))
        if missing == n:
            notes.append("no interval: per-sequence losses are missing or of other sequences")
        else:
            row["low"], row["high"] = percentile_interval(resampled)
            row |= {"resamples": n, "without_minimum": missing}
            notes += [f"no minimum in {missing} of {n} resamples"] * (missing > RARE * n)
    return {**row, "flagged": bool(notes), "note": "; ".join(notes)}


if __name__ == "__main__":
    sys.exit(exit_code(main))
