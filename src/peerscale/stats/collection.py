"""From the cells of a study to its records, tables and fits."""

import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from peerscale.config.compose import of_cells, overridden
from peerscale.config.study import load_sweep
from peerscale.config.study_file import sweep_text
from peerscale.errors import UserError
from peerscale.files import ROOT, write_json, write_text
from peerscale.layers.registry import code_changed
from peerscale.plan.cell_names import corpus_label
from peerscale.plan.cells import Cell, planned_cells, without_brackets
from peerscale.plan.notices import beyond_law
from peerscale.plan.plan import Verdict
from peerscale.records.curves import curves_table
from peerscale.records.matching import further_line, of_the_plan, on_one_corpus, some
from peerscale.records.record import Record, planned_record
from peerscale.records.study import collected
from peerscale.records.table import read_records, runs_table, to_publish, write_records
from peerscale.stats.comparison import compare
from peerscale.stats.curve import Curve, methods_of, require_methods
from peerscale.stats.fits import fit_study
from peerscale.stats.guests import compare_with_guests

Place = tuple[float, Curve]
"""A budget and a curve."""


def collect(sweep: str, runs: Path, overrides: Sequence[str] = (), methods: Sequence[str] = ()) -> Iterator[str]:
    """Write the study's folder in `runs` from its cells there.

    Every planned cell has a row, even if it was dropped, failed or never run. Cells whose configuration differs from
    the plan's are left out.

    Args:
        sweep: name of the study.
        runs: folder of cells.
        overrides: the overrides that the cells were run with.
        methods: methods that must have finished runs.

    Yields:
        Messages on what was collected.

    Raises:
        UserError: there are no records, or none of one of the `methods`; or the overrides are wrong or name another
            folder of runs.
    """
    elsewhere = overridden(overrides).get("trainer.runs_directory", runs)
    if (ROOT / Path(elsewhere).expanduser()).resolve() != runs.resolve():
        raise UserError(f"cells are read from {runs}; give --runs {elsewhere} to the programs in analysis/")
    here = runs / sweep
    there = read_records(here)
    cells = plan_of(sweep, overrides, needed=not there)
    corpus = corpus_label(cells[0].axes) if cells else ""
    study = collected(sweep, runs, corpus)
    own = {record.cell: record for record in there if not cells or corpus_label(record.axes) == corpus}
    if not own:
        where = f"{here}{' on ' * bool(corpus)}{corpus}"
        raise UserError(f"no cells in {where}; those of results/, if it has any: make restore SWEEP={sweep}")
    own, foreign, fingerprint = on_one_corpus(own, {cell.name for cell in cells or ()})
    found, notices = of_the_plan(cells or (), own, here, fingerprint)
    print(*(f"{notice}\n" for notice in notices), sep="", end="", file=sys.stderr)
    planned, further = with_planned(cells, found)
    if older := [record.cell for record in further if code_changed(record.hashed_config.get("ffn", {}))]:
        print(f"notice: runs of older code, since the layer's module was changed: {some(older)}", file=sys.stderr)
    records = [to_publish(record) for record in (*planned, *further)]  # so that results/ alone gives the same fits
    table, curves = runs_table(records), curves_table(here / cell for cell in found)
    require_methods(methods, table, sweep)
    # The plan is that of the file already if there are neither overrides nor guests.
    usual = usual_cells(sweep, [*methods_of(table).unique()]) if cells and (overrides or further) else ()
    fits = fits_of(sweep, table, records, extrapolated(cells or ()) | extrapolated(usual))
    write_records(study.folder, records)
    write_text(study.curves, curves.to_csv(index=False))
    write_text(study.runs, table.to_csv(index=False))
    write_json(study.fits, fits)
    states = ", ".join(f"{n} {status}" for status, n in Counter(record.status for record in planned).items())
    yield f"{sweep}: {len(planned)} cells ({states}), from {len(found)} cells of {here} -> {study.folder}"
    if further:
        names = [record.cell for record in further]
        said = in_the_fits(methods_of(table[table["cell"].isin(names)]), fits.get("guests", ()))
        yield f"{further_line(names)}; {said}"
    if foreign:
        yield f"{len(foreign)} cells of another corpus or evaluation set are left out: {some(foreign)}"


def in_the_fits(methods: Collection[str], guests: Collection[str]) -> str:
    """What cells outside the plan move, by their methods: those of guests move the results of no other method."""
    if not (some := sorted({*methods} & {*guests})):
        return "they are in the table and the fits too"
    rest = "; the others are in the table and the fits too" * bool({*methods} - {*guests})
    return f"those of {', '.join(some)} are in the table, and in the fits of no other method{rest}"


def fits_of(
    sweep: str, runs: pd.DataFrame, records: Sequence[Record], beyond: Collection[Place] = ()
) -> dict[str, Any]:
    """Everything that is computed from the table of runs, as the study's file asks; `beyond`: see `extrapolated`."""
    held_out = load_sweep(sweep).held_out if sweep_text(sweep) else ()
    return rounded(fit_study(runs, compared(sweep, runs, records, beyond), held_out))


def compared(
    sweep: str, runs: pd.DataFrame, records: Sequence[Record], beyond: Collection[Place] = (), baseline: str = ""
) -> dict[str, Any]:
    """`comparison.compare` as the study's file asks, or with another baseline than it names."""
    if not sweep_text(sweep):  # a renamed study has no file
        return compare(runs, records, baseline=baseline or "dense", extrapolated=beyond)
    asked = load_sweep(sweep)
    budgets = sorted({row.budget for row in asked.grid})
    claims = asked.claims and replace(asked.claims, budgets=asked.claims.budgets or budgets)
    return compare_with_guests(
        runs, records, asked.methods, baseline=baseline or asked.baseline, min_sizes=asked.min_sizes, claims=claims,
        rates_cost=asked.rates_cost, trend_from=asked.trend_from, extrapolated=beyond,
    )  # fmt: skip


def extrapolated(cells: Sequence[Cell]) -> set[Place]:
    """Budgets and curves with cells outside the runs that their law of learning rates was fitted to."""
    beyond = [cell for cell in without_brackets(cells) if beyond_law(cell.config, cell.plan.tokens)]
    return {(cell.config.budget, Curve.of(cell.config.ffn.name, cell.axes)) for cell in beyond
            if cell.plan.verdict is Verdict.OK}  # fmt: skip


def rounded(fits: Any, digits: int = 7) -> Any:
    """JSON with so many significant digits in each fraction, since the last digits of a fit differ between processors.

    Coefficients of parabolas have two more, since their terms nearly cancel.
    """
    if isinstance(fits, Mapping):
        return {key: rounded(value, digits + 2 * (key == "coefficients")) for key, value in fits.items()}
    if isinstance(fits, (list, tuple)):
        return [rounded(value, digits) for value in fits]
    return float(f"{fits:.{digits}g}") if isinstance(fits, float) and not fits.is_integer() else fits


def plan_of(sweep: str, overrides: Sequence[str], *, needed: bool = False) -> Sequence[Cell] | None:
    """The cells of the study's file with the overrides of cells, as cells outside a part count too; or None, with a
    notice, if it cannot be read. Raises `UserError` for that if it is `needed`, and for a wrong override, also one of
    a part."""
    try:
        if (of_all := of_cells(overrides)) != [*overrides]:
            planned_cells(sweep, overrides)
        return planned_cells(sweep, of_all)
    except UserError as error:
        if overrides or needed:
            raise
        notice = "notice: only cells with a record are in the table, as the plan cannot be read"
        print(f"{notice}: {error}", file=sys.stderr)
        return None


def usual_cells(sweep: str, methods: Sequence[str]) -> Sequence[Cell]:
    """The cells that the study's file gives some methods, guests among them; none if one cannot be planned here."""
    try:
        return planned_cells(sweep, [f"sweep.methods=[{','.join(methods)}]"])
    except UserError:
        return ()


def with_planned(cells: Sequence[Cell] | None, found: Mapping[str, Record]) -> tuple[list[Record], list[Record]]:
    """Records of all planned cells, in the order of the plan (new ones for cells without), and all other records."""
    if cells is None:
        return [*found.values()], []
    planned = [found.get(cell.name) or planned_record(cell) for cell in cells]
    names = {cell.name for cell in cells}
    return planned, [record for name, record in found.items() if name not in names]
