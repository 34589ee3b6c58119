"""From the records of a study to its tables and fits: runs.csv, records.jsonl, curves.csv, fits.json.

    python analysis/collect.py SWEEP [--with-published]

Reads the cells in runs/SWEEP, or results/SWEEP where there are none, or both; writes runs/SWEEP/study. Every planned
cell has a row, also those that were dropped, failed, or never run.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from peerscale.errors import UserError, exit_code
from peerscale.files import write_json, write_text
from peerscale.runs.comparison import Claims
from peerscale.runs.fits import fit_study
from peerscale.runs.record import Record, Status
from peerscale.runs.study import collected, planned_record, published, study_parser
from peerscale.runs.table import CURVES, curves_table, read_records, read_table, runs_table
from peerscale.sweep_config import load_sweep
from peerscale.sweeper import planned_cells
from peerscale.viz.answer import answer


def main(argv: Sequence[str] | None = None) -> int:
    parser = study_parser(__doc__)
    parser.add_argument("--with-published", action="store_true", help="add the published cells that were not run here")
    arguments = parser.parse_args(argv)
    table = published(arguments.sweep, arguments.results)
    if table.runs.is_file() and not table.records.is_file() and not read_records(arguments.runs / arguments.sweep):
        print(f"{arguments.sweep}: published without its records, so there is nothing to fit again: {table.runs}")
        return 0
    records, curves = read_study(
        arguments.sweep, arguments.runs, arguments.results, with_published=arguments.with_published
    )
    study = collected(arguments.sweep, arguments.runs)
    runs = runs_table(records)
    windows, claims = read_settings(arguments.sweep)
    fits = fit_study(runs, curves, records, windows=windows, claims=claims)
    fits["answer"] = answer(fits)
    write_text(study.runs, runs.to_csv(index=False))
    write_text(study.records, "".join(json.dumps(asdict(record)) + "\n" for record in records))
    write_text(study.curves, curves.to_csv(index=False))
    write_json(study.fits, fits)
    counts = ", ".join(f"{n} {status}" for status, n in runs["status"].value_counts().items())
    print(f"{arguments.sweep}: {len(runs)} cells ({counts}) -> {study.folder}")
    return 0


def read_study(
    sweep: str, runs: Path, results: Path, *, with_published: bool = False
) -> tuple[list[Record], pd.DataFrame]:
    """Records of all cells, planned ones included, and the training curves; from `runs`, else as published.

    With `with_published` both are read, and a published cell counts where `runs` has no record of it.

    Raises:
        UserError: there are none, or the published ones are of another corpus or recipe.
    """
    records = read_records(runs / sweep)
    source = published(sweep, results)
    if not source.records.is_file() and (with_published or not records):
        raise UserError(f"no runs of {sweep!r}: neither cells in {runs / sweep} nor {source.records}")
    if records and not with_published:
        return with_planned(sweep, records), curves_table(runs / sweep / record.cell for record in records)
    others = read_records(source.folder)
    curves = read_table(source.curves, CURVES) if source.curves.is_file() else curves_table(())
    if not records:
        return others, curves
    refuse_incomparable(records, others, source.records)
    run_here = [record.cell for record in records]
    others = [record for record in others if record.cell not in run_here]
    print(f"{sweep}: {len(run_here)} cells of {runs / sweep}, {len(others)} of {source.folder}")
    own_curves = curves_table(runs / sweep / cell for cell in run_here)
    curves = pd.concat([own_curves, curves[~curves["cell"].isin(run_here)]], ignore_index=True)
    return with_planned(sweep, records + others), curves


def refuse_incomparable(own: Sequence[Record], others: Sequence[Record], where: Path) -> None:
    """Raise `UserError` unless all finished cells were trained by one recipe on one corpus."""
    for key in ("recipe_version", "data_fingerprint"):
        here, there = ({r.science[key] for r in records if r.status is Status.DONE} for records in (own, others))
        if here and there and here != there:
            raise UserError(f"{where}: {key} {_listed(there)}, but the cells run here have {_listed(here)}")


def _listed(values: set[Any]) -> str:
    return ", ".join(sorted(map(str, values)))


def with_planned(sweep: str, records: list[Record]) -> list[Record]:
    """The records in the order of the plan, with one made for each cell that has none; unplanned ones come last."""
    try:
        cells = planned_cells(sweep)
    except UserError as error:
        notice = "notice: only cells with a record are in the table, as the plan cannot be read"
        print(f"{notice}: {error}", file=sys.stderr)
        return records
    found = {record.cell: record for record in records}
    planned = [found.pop(cell.name, None) or planned_record(sweep, cell) for cell in cells]
    return planned + list(found.values())


def read_settings(sweep: str) -> tuple[dict[float, tuple[float, float] | None], Claims | None]:
    """The window of each budget and the family of claims, as the study's file has them; none if it cannot be read."""
    try:
        study = load_sweep(sweep)
    except UserError:
        return {}, None
    return {row.budget: study.window(row.budget) for row in study.grid}, study.claims


if __name__ == "__main__":
    sys.exit(exit_code(main))
