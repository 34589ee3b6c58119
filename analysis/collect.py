"""From the records of a study to its tables and fits: runs.csv, records.jsonl, curves.csv, fits.json, differences.csv.

    python analysis/collect.py SWEEP [--with-published]

Reads the cells in runs/SWEEP, or results/SWEEP where there are none, or both; writes runs/SWEEP/study. Every planned
cell has a row, also those that were dropped, failed, or never run.
"""

import itertools
import json
import sys
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
from peerscale.runs.fits import fit_study
from peerscale.runs.record import Record, Status
from peerscale.runs.study import collected, method_names, planned_record, published, study_parser, usable
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
    records, curves = read_study(
        arguments.sweep, arguments.runs, arguments.results, with_published=arguments.with_published
    )
    study = collected(arguments.sweep, arguments.runs)
    runs = runs_table(records)
    fits = fit_study(runs, curves)
    write_text(study.runs, runs.to_csv(index=False))
    write_text(study.records, "".join(json.dumps(asdict(record)) + "\n" for record in records))
    write_text(study.curves, curves.to_csv(index=False))
    write_json(study.fits, fits)
    write_text(study.differences, compare(runs, records, fits).round(6).to_csv(index=False))
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
