"""From the records of a study to its tables and fits: runs.csv, records.jsonl, curves.csv, fits.json."""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd

from peerscale.config.axes import overridden_key
from peerscale.config.compose import of_cells, sweep_text
from peerscale.config.study import load_sweep
from peerscale.errors import UserError
from peerscale.figures.answer import answer
from peerscale.files import ROOT, write_json, write_text
from peerscale.launch.outcomes import further_line, of_the_plan, read_published, some, which_counts
from peerscale.plan.cells import Cell, planned_cells
from peerscale.records.curves import CURVES, curves_table
from peerscale.records.publication import public
from peerscale.records.record import Record, Status
from peerscale.records.study import collected, planned_record, published
from peerscale.records.table import read_records, read_table, runs_table
from peerscale.stats.comparison import compare
from peerscale.stats.fits import fit_study


def collect(
    sweep: str, runs: Path, results: Path, overrides: Sequence[str] = (), *, with_published: bool = False
) -> Iterator[str]:
    """Write the study's folder in `runs` from its cells there, or from `results` if there are none, or from both.

    Every planned cell has a row, even if it was dropped, failed or never run. With both, a published cell counts if
    `runs` has no finished cell of that name, unless its configuration differs from the plan's. Cells in `runs` whose
    configuration differs are left out as well.

    Args:
        sweep: name of the study.
        runs, results: folders of cells, and of published studies.
        overrides: the overrides that the cells were run with.
        with_published: whether to add the published cells that were not run here.

    Yields:
        Messages on what was collected.

    Raises:
        UserError: there are no records, or the overrides name another folder of runs.
    """
    for override in overrides:
        key, value = overridden_key(override), override.partition("=")[2]
        if key == "trainer.runs_directory" and (ROOT / Path(value).expanduser()).resolve() != runs.resolve():
            raise UserError(f"{override}: cells are read from {runs}; give --runs {value} to the programs in analysis/")
    overrides = of_cells(overrides)  # cells outside the plan count in any case
    here, source, study = runs / sweep, published(sweep, results), collected(sweep, runs)
    own = {record.cell: record for record in read_records(here)}
    if not source.records.is_file() and (with_published or not own):
        raise UserError(f"no runs of {sweep!r}: neither cells in {here} nor {source.records}")
    cells, there = plan_of(sweep, overrides), read_published(source)
    names = {cell.name for cell in cells or ()}
    used = Counter(
        r.hashed_config.get("data_fingerprint")
        for r in own.values()
        if r.status is Status.DONE and (not names or r.cell in names)
    )
    corpus = max(used, key=lambda each: used[each], default=None)
    same, notices = of_the_plan(cells or (), there, source.folder, corpus)
    if own and not with_published:
        notices = []
    there = there if not own else same if with_published else {}
    own, differ = of_the_plan(cells or (), own, here, corpus)
    print(*(f"{notice}\n" for notice in [*differ, *notices]), sep="", end="", file=sys.stderr)
    counting = {name: which_counts(own.get(name), there.get(name)) for name in {**own, **there}}
    found = {name: record for name, record in counting.items() if record is not None}
    run_here = [name for name in found if found[name] is own.get(name)]
    curves = curves_table(here / cell for cell in run_here)
    if there and source.curves.is_file():
        others = read_table(source.curves, CURVES)
        curves = pd.concat([curves, others[~others["cell"].isin(run_here)]], ignore_index=True) if run_here else others
    planned, further = with_planned(cells, found)
    corpora = {record.hashed_config.get("data_fingerprint") for record in planned if record.status is Status.DONE}
    foreign = [r.cell for r in further if corpora and r.hashed_config.get("data_fingerprint") not in corpora]
    further = [record for record in further if record.cell not in foreign]
    records = [*planned, *further]
    table = runs_table(records)
    fits = fits_of(sweep, table, curves, records)
    write_text(study.records, "".join(json.dumps(asdict(record)) + "\n" for record in records))
    write_text(study.curves, curves.to_csv(index=False))
    write_text(study.runs, table.to_csv(index=False))
    write_json(study.fits, fits)
    states = ", ".join(f"{n} {status}" for status, n in Counter(record.status for record in planned).items())
    counts = {here: len(run_here), source.folder: len(found) - len(run_here)}
    places = ", ".join(f"{n} cells of {folder}" for folder, n in counts.items() if n) or f"0 cells of {here}"
    yield f"{sweep}: {len(planned)} cells ({states}), from {places} -> {study.folder}"
    if further:
        yield f"{further_line([record.cell for record in further])}; they are in the table and the fits too"
    if foreign:
        yield f"{len(foreign)} cells of another corpus are left out: {some(foreign)}"
    done = {record.cell for record in planned if record.status is Status.DONE}
    missed = [r.cell for r in planned if r.cell not in done and r.cell in same and same[r.cell].status is Status.DONE]
    if missed:
        yield f"{len(missed)} of them are finished in {source.folder}: make figures SWEEP={sweep} PUBLISHED=1"


def fits_of(sweep: str, runs: pd.DataFrame, curves: pd.DataFrame, records: Sequence[Record]) -> dict[str, Any]:
    """Everything that is computed from the table of runs, with the windows and claims of the study's file."""
    settings = load_sweep(sweep) if sweep_text(sweep) else None  # a renamed study has no file
    windows = {row.budget: settings.window(row.budget) for row in settings.grid} if settings else {}
    said = {key: getattr(settings, key) for key in ("claims", "rates_cost", "trend_from")} if settings else {}
    if (claims := said.get("claims")) and not claims.budgets:
        said["claims"] = replace(claims, budgets=sorted(windows))
    as_published = [public(record) for record in records]  # so that results/ alone gives the same fits
    compared = compare(runs, as_published, windows=windows, **said)
    fits = fit_study(runs, curves, compared, settings.held_out if settings else ())
    fits["answer"] = answer(fits)
    return rounded(fits)


def rounded(fits: Any, digits: int = 7) -> Any:
    """JSON with so many significant digits in each fraction, since the last digits of a fit differ between processors.

    Coefficients of parabolas have two more, since their terms nearly cancel.
    """
    if isinstance(fits, Mapping):
        return {key: rounded(value, digits + 2 * (key == "coefficients")) for key, value in fits.items()}
    if isinstance(fits, (list, tuple)):
        return [rounded(value, digits) for value in fits]
    return float(f"{fits:.{digits}g}") if isinstance(fits, float) and not fits.is_integer() else fits


def plan_of(sweep: str, overrides: Sequence[str]) -> Sequence[Cell] | None:
    """The cells of the study's file with `overrides`; None, with a notice, if it cannot be read."""
    try:
        return planned_cells(sweep, overrides)
    except UserError as error:
        notice = "notice: only cells with a record are in the table, as the plan cannot be read"
        print(f"{notice}: {error}", file=sys.stderr)
        return None


def with_planned(cells: Sequence[Cell] | None, found: Mapping[str, Record]) -> tuple[list[Record], list[Record]]:
    """Records of all planned cells, in the order of the plan (new ones for cells without), and all other records."""
    if cells is None:
        return [*found.values()], []
    planned = [found.get(cell.name) or planned_record(cell) for cell in cells]
    names = {cell.name for cell in cells}
    return planned, [record for name, record in found.items() if name not in names]
