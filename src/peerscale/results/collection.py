"""From the records of a study to its tables and fits: runs.csv, records.jsonl, curves.csv, fits.json."""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from peerscale.cells import Cell, planned_cells
from peerscale.composition import of_cells
from peerscale.errors import UserError
from peerscale.files import write_json, write_text
from peerscale.outcomes import further_line, of_the_plan, read_published, some, which_counts
from peerscale.runs.comparison import compare
from peerscale.runs.fits import fit_study
from peerscale.runs.record import Record, Status
from peerscale.runs.study import RESULTS, Study, collected, planned_record, published
from peerscale.runs.table import CURVES, curves_table, read_records, read_runs, read_table, runs_table
from peerscale.sweep_config import load_sweep
from peerscale.viz.answer import answer

STEPS = RESULTS / "bench" / "training_step.csv"
"""Times of training steps, which `make bench` publishes."""


def collect(
    sweep: str, runs: Path, results: Path, overrides: Sequence[str] = (), *, with_published: bool = False
) -> Iterator[str]:
    """Write the study's folder in `runs` from its cells there, or from `results` where there are none, or from both.

    Every planned cell has a row, also those that were dropped, failed, or never run.

    Args:
        sweep: name of the study.
        runs, results: folders of cells, and of published studies.
        overrides: that the cells were run with.
        with_published: whether to add the published cells that were not run here.

    Yields:
        What was collected, in words.
    """
    overrides = of_cells(overrides)  # further cells count in any case
    source, study = published(sweep, results), collected(sweep, runs)
    if source.runs.is_file() and not source.records.is_file() and not read_records(runs / sweep):
        table = read_runs(source.runs)
        write_fits(study, table, curves_table(()), [])
        yield f"{sweep}: {len(table)} cells, from {source.runs} (without records) -> {study.folder}"
        return
    read = read_study(sweep, runs, results, overrides, with_published=with_published)
    corpora = {record.hashed_config.get("data_fingerprint") for record in read.planned if record.status is Status.DONE}
    further = [r for r in read.further if not corpora or r.hashed_config.get("data_fingerprint") in corpora]
    foreign = [record for record in read.further if record not in further]
    records = [*read.planned, *further]
    table = runs_table(records)  # before anything is written: a record may be refused
    write_text(study.records, "".join(json.dumps(asdict(record)) + "\n" for record in records))
    write_text(study.curves, read.curves.to_csv(index=False))
    write_fits(study, table, read.curves, records)
    states = ", ".join(f"{n} {status}" for status, n in Counter(record.status for record in read.planned).items())
    yield f"{sweep}: {len(read.planned)} cells ({states}), from {read.source} -> {study.folder}"
    if further:
        yield f"{further_line([record.cell for record in further])}; they are in the table and the fits too"
    if foreign:
        yield f"{len(foreign)} cells of another corpus are left out: {some([record.cell for record in foreign])}"
    missed = sum(record.cell in read.left_out and record.status is not Status.DONE for record in read.planned)
    if missed:
        yield f"{missed} of them are finished in {source.folder}: make figures SWEEP={sweep} PUBLISHED=1"


def write_fits(study: Study, runs: pd.DataFrame, curves: pd.DataFrame, records: Sequence[Record]) -> None:
    """Write the table of runs and all that is computed from it, by the windows and claims of the study's file."""
    try:
        settings = load_sweep(study.sweep)
    except UserError:  # of a study without a file, such as one that was renamed
        settings = None
    windows = {row.budget: settings.window(row.budget) for row in settings.grid} if settings else {}
    said = {key: getattr(settings, key) for key in ("claims", "rates_cost", "trend_from")} if settings else {}
    compared = compare(runs, records, windows=windows, **said)
    steps = pd.read_csv(STEPS) if STEPS.is_file() else None
    fits = fit_study(runs, curves, compared, settings.held_out if settings else (), steps)
    fits["answer"] = answer(fits)
    write_text(study.runs, runs.to_csv(index=False))
    write_json(study.fits, fits)


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


def read_study(
    sweep: str, runs: Path, results: Path, overrides: Sequence[str] = (), *, with_published: bool = False
) -> StudyRecords:
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
    cells = plan_of(sweep, overrides)
    there = read_published(source)
    same, notices = of_the_plan(cells or (), there, source.folder, None)
    if own and not with_published:
        finished = {name for name, record in same.items() if record.status is Status.DONE}
        curves = curves_table(here / cell for cell in own)
        return StudyRecords(*with_planned(cells, own), curves, str(here), finished)
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
    return StudyRecords(*with_planned(cells, found), curves, words, set())


def refuse_incomparable(own: Sequence[Record], others: Sequence[Record], where: Path) -> None:
    """Raise `UserError` unless all finished cells were trained by one recipe on one corpus."""
    for key in ("recipe_version", "data_fingerprint"):
        here, there = (
            {str(r.hashed_config[key]) for r in records if r.status is Status.DONE} for records in (own, others)
        )
        if here and there and here != there:
            listed = [", ".join(sorted(values)) for values in (there, here)]
            raise UserError(f"{where}: {key} {listed[0]}, but the cells run here have {listed[1]}")


def plan_of(sweep: str, overrides: Sequence[str]) -> Sequence[Cell] | None:
    """The cells of the study's file with `overrides`; None, with a notice, where it cannot be read."""
    try:
        return planned_cells(sweep, overrides)
    except UserError as error:
        notice = "notice: only cells with a record are in the table, as the plan cannot be read"
        print(f"{notice}: {error}", file=sys.stderr)
        return None


def with_planned(cells: Sequence[Cell] | None, found: Mapping[str, Record]) -> tuple[list[Record], list[Record]]:
    """A record for each cell of the plan, in its order, made where there is none; and those of no cell of the plan."""
    if cells is None:
        return [*found.values()], []
    planned = [found.get(cell.name) or planned_record(cell) for cell in cells]
    names = {cell.name for cell in cells}
    return planned, [record for name, record in found.items() if name not in names]
