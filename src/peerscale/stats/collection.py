"""From the cells of a study to its records, tables and fits."""

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from peerscale.config.compose import of_cells, overridden
from peerscale.config.study import load_sweep
from peerscale.config.study_file import sweep_text
from peerscale.errors import UserError
from peerscale.figures.answer import answer
from peerscale.files import ROOT, write_json, write_text
from peerscale.plan.cells import Cell, planned_cells
from peerscale.records.curves import curves_table
from peerscale.records.matching import further_line, of_the_plan, some
from peerscale.records.record import Record, Status, planned_record
from peerscale.records.study import collected
from peerscale.records.table import read_records, runs_table, to_publish, write_records
from peerscale.stats.comparison import compare
from peerscale.stats.fits import fit_study


def collect(sweep: str, runs: Path, overrides: Sequence[str] = ()) -> Iterator[str]:
    """Write the study's folder in `runs` from its cells there.

    Every planned cell has a row, even if it was dropped, failed or never run. Cells whose configuration differs from
    the plan's are left out.

    Args:
        sweep: name of the study.
        runs: folder of cells.
        overrides: the overrides that the cells were run with.

    Yields:
        Messages on what was collected.

    Raises:
        UserError: there are no records, or the overrides name another folder of runs.
    """
    elsewhere = overridden(overrides).get("trainer.runs_directory", runs)
    if (ROOT / Path(elsewhere).expanduser()).resolve() != runs.resolve():
        raise UserError(f"cells are read from {runs}; give --runs {elsewhere} to the programs in analysis/")
    overrides = of_cells(overrides)  # cells outside the plan count in any case
    here, study = runs / sweep, collected(sweep, runs)
    own = {record.cell: record for record in read_records(here)}
    if not own:
        raise UserError(f"no cells in {here}; those of results/, if it has any: make restore SWEEP={sweep}")
    cells = plan_of(sweep, overrides)
    names = {cell.name for cell in cells or ()}
    used = Counter(
        r.hashed_config.get("data_fingerprint")
        for r in own.values()
        if r.status is Status.DONE and (not names or r.cell in names)
    )
    corpus = max(used, key=lambda each: used[each], default=None)
    found, notices = of_the_plan(cells or (), own, here, corpus)
    print(*(f"{notice}\n" for notice in notices), sep="", end="", file=sys.stderr)
    planned, further = with_planned(cells, found)
    corpora = {record.hashed_config.get("data_fingerprint") for record in planned if record.status is Status.DONE}
    foreign = [r.cell for r in further if corpora and r.hashed_config.get("data_fingerprint") not in corpora]
    further = [record for record in further if record.cell not in foreign]
    records = [to_publish(record) for record in (*planned, *further)]  # so that results/ alone gives the same fits
    table, curves = runs_table(records), curves_table(here / cell for cell in found)
    fits = fits_of(sweep, table, curves, records)
    write_records(study.folder, records)
    write_text(study.curves, curves.to_csv(index=False))
    write_text(study.runs, table.to_csv(index=False))
    write_json(study.fits, fits)
    states = ", ".join(f"{n} {status}" for status, n in Counter(record.status for record in planned).items())
    yield f"{sweep}: {len(planned)} cells ({states}), from {len(found)} cells of {here} -> {study.folder}"
    if further:
        yield f"{further_line([record.cell for record in further])}; they are in the table and the fits too"
    if foreign:
        yield f"{len(foreign)} cells of another corpus are left out: {some(foreign)}"


def fits_of(sweep: str, runs: pd.DataFrame, curves: pd.DataFrame, records: Sequence[Record]) -> dict[str, Any]:
    """Everything that is computed from the table of runs, with the windows and claims of the study's file."""
    settings = load_sweep(sweep) if sweep_text(sweep) else None  # a renamed study has no file
    windows = {row.budget: settings.window(row.budget) for row in settings.grid} if settings else {}
    said = {key: getattr(settings, key) for key in ("claims", "rates_cost", "trend_from")} if settings else {}
    if (claims := said.get("claims")) and not claims.budgets:
        said["claims"] = replace(claims, budgets=sorted(windows))
    compared = compare(runs, records, windows=windows, **said)
    fits = fit_study(runs, compared, settings.held_out if settings else ())
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
