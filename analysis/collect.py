"""From the records of a study to its tables and fits: runs.csv, records.jsonl, curves.csv, fits.json.

    python analysis/collect.py SWEEP [--with-published]

Reads the cells in runs/SWEEP, or results/SWEEP where there are none, or both; writes runs/SWEEP/study. Every planned
cell has a row, also those that were dropped, failed, or never run.
"""

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from peerscale.cells import planned_cells
from peerscale.composition import of_cells
from peerscale.errors import UserError, exit_code
from peerscale.files import write_json, write_text
from peerscale.outcomes import further_line, of_the_plan, read_published, some, which_counts
from peerscale.runs.comparison import compare
from peerscale.runs.fits import fit_study
from peerscale.runs.record import PlannedCell, Record, Status
from peerscale.runs.study import Study, collected, planned_record, published, study_parser
from peerscale.runs.table import CURVES, curves_table, read_records, read_runs, read_table, runs_table
from peerscale.sweep_config import load_sweep
from peerscale.viz.answer import answer


def main(argv: Sequence[str] | None = None) -> int:
    parser = study_parser(__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides that the cells were run with")
    parser.add_argument("--with-published", action="store_true", help="add the published cells that were not run here")
    arguments = parser.parse_args(argv)
    overrides = of_cells(arguments.overrides)  # further cells count in any case
    table, study = published(arguments.sweep, arguments.results), collected(arguments.sweep, arguments.runs)
    if table.runs.is_file() and not table.records.is_file() and not read_records(arguments.runs / arguments.sweep):
        runs = read_runs(table.runs)
        write_fits(study, runs, curves_table(()), [])
        print(f"{arguments.sweep}: {len(runs)} cells, from {table.runs} (without records) -> {study.folder}")
        return 0
    read = read_study(
        arguments.sweep, arguments.runs, arguments.results, overrides, with_published=arguments.with_published
    )
    further, foreign = of_one_corpus(read.planned, read.further)
    records = [*read.planned, *further]
    runs = runs_table(records)  # before anything is written: a record may be refused
    write_text(study.records, "".join(json.dumps(asdict(record)) + "\n" for record in records))
    write_text(study.curves, read.curves.to_csv(index=False))
    write_fits(study, runs, read.curves, records)
    counts = Counter(record.status for record in read.planned)
    states = ", ".join(f"{n} {status}" for status, n in counts.items())
    print(f"{arguments.sweep}: {len(read.planned)} cells ({states}), from {read.source} -> {study.folder}")
    if further:
        print(f"{further_line([record.cell for record in further])}; they are in the table and the fits too")
    if foreign:
        print(f"{len(foreign)} cells of another corpus are left out: {some([record.cell for record in foreign])}")
    missed = sum(record.cell in read.left_out and record.status is not Status.DONE for record in read.planned)
    if missed:
        print(f"{missed} of them are finished in {table.folder}: make figures SWEEP={arguments.sweep} PUBLISHED=1")
    return 0


def of_one_corpus(planned: Sequence[Record], further: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """Cells outside the plan that were trained on the corpus of its finished cells, and those that were not."""
    corpora = {record.hashed_config.get("data_fingerprint") for record in planned if record.status is Status.DONE}
    same = [record for record in further if not corpora or record.hashed_config.get("data_fingerprint") in corpora]
    return same, [record for record in further if record not in same]


def write_fits(study: Study, runs: pd.DataFrame, curves: pd.DataFrame, records: Sequence[Record]) -> None:
    """Write the table of runs and all that is computed from it, by the windows and claims of the study's file."""
    try:
        settings = load_sweep(study.sweep)
    except UserError:  # of a study without a file, such as one that was renamed
        settings = None
    windows = {row.budget: settings.window(row.budget) for row in settings.grid} if settings else {}
    compared = compare(runs, records, windows=windows, claims=settings.claims if settings else None)
    fits = fit_study(runs, curves, compared)
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
        here, there = ({r.hashed_config[key] for r in records if r.status is Status.DONE} for records in (own, others))
        if here and there and here != there:
            raise UserError(f"{where}: {key} {_listed(there)}, but the cells run here have {_listed(here)}")


def _listed(values: set[Any]) -> str:
    return ", ".join(sorted(map(str, values)))


def plan_of(sweep: str, overrides: Sequence[str]) -> Sequence[PlannedCell] | None:
    """The cells of the study's file with `overrides`; None, with a notice, where it cannot be read."""
    try:
        return planned_cells(sweep, overrides)
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
    planned = [found.get(cell.name) or planned_record(cell) for cell in cells]
    names = {cell.name for cell in cells}
    return planned, [record for name, record in found.items() if name not in names]


if __name__ == "__main__":
    sys.exit(exit_code(main))
