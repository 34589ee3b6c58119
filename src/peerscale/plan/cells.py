"""A study's file -> its planned cells with their names, and which of them are still to be run."""

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from peerscale.config.compose import (
    Composition,
    StudyFile,
    composed,
    of_cells,
    overridden,
    read_study,
    resolved,
    set_value,
    value_at,
)
from peerscale.config.errors import ConfigError
from peerscale.config.schema import Config, parse_config, to_dict
from peerscale.config.study import RATE_FACTOR, SweepConfig, load_sweep
from peerscale.data.store import folder as corpus_folder
from peerscale.data.store import read_manifest
from peerscale.errors import UserError
from peerscale.plan.cell import Cell
from peerscale.plan.cell_names import cell_name, changes
from peerscale.plan.plan import Verdict, plan
from peerscale.records.record import Record, Status, differences, read_record, set_aside
from peerscale.records.speed import estimate_s, measured_speeds

SINGLE = "single"
"""The folder of cells that belong to no study."""

FINISHED = (Status.DONE, Status.DIVERGED, Status.DROPPED)
"""Cells that a sweep does not run again. A diverged cell would diverge again; see `how_to_rerun`."""


def planned_cells(sweep: str | Path, overrides: Sequence[str] = ()) -> list[Cell]:
    """Every cell of a study, including dropped ones, in the order of its file.

    Args:
        sweep: the study's name, or its file.
        overrides: further overrides of every cell; those of the `sweep` section, such as `sweep.budgets=[1e12]`,
            choose the part of the study that is planned.

    Raises:
        ConfigError: the study's file names an unknown method, size or key, or describes a cell twice.
    """
    file = read_study(sweep)
    name, whole, study, words = file.path.name, load_sweep(file), load_sweep(file, overrides), of_cells(overrides)
    _refuse_without_effect(file, whole)
    _refuse_varied(name, whole, words)
    cells: list[Cell] = []
    for method in study.methods:
        compose = partial(composed, study=file, resolve=False)
        composition = compose([f"ffn={method}", *words])
        changed = changes(composition, compose) if words else {}
        usual = composition.tree
        for key, value in study.method_settings.get(method, {}).items():
            set_value(usual, key, value)
        for row in (row for row in study.rows if method in (row.methods or study.methods)):
            axes = study.axes_of(method, row)
            for size, (seed, own) in itertools.product(row.sizes, _combinations(axes, row.seeds or study.seeds)):
                tree = {**deepcopy(usual), **size, "budget": row.budget, "seed": seed}
                if row.batch_sequences:
                    tree["batch_sequences"] = row.batch_sequences
                for key, value in own.items():
                    set_value(tree, key, value)
                # An axis of a row that takes its usual value is left out of the cell's name.
                told = {key: v for key, v in own.items() if key not in row.axes or value_at(usual, key) != v}
                cells.append(_cell(file.path.stem, parse_config(resolved(tree), f"{name}: {method}: "), told | changed))
    _check_together(name, cells)
    return _with_estimates(cells)


def _combinations(axes: Mapping[str, list[Any]], seeds: list[int]) -> list[tuple[int, dict[str, Any]]]:
    """Every seed with every combination of the values of the axes."""
    values = itertools.product(*axes.values())
    return [(seed, dict(zip(axes, each, strict=True))) for each in values for seed in seeds]


def _refuse_without_effect(file: StudyFile, study: SweepConfig) -> None:
    """Raise `ConfigError` for a setting in a study's file that none of the cells would have, since each has its own."""
    where, given = file.path.name, {method: study.given_to_all(method) for method in study.methods}
    for method, settings in study.method_settings.items():
        if unused := sorted(settings.keys() & given[method]):
            raise ConfigError(
                f"{where}: sweep.method_settings.{method}.{unused[0]} has no effect: every cell has its own"
            )
        given[method] |= settings.keys()
    absent = object()
    for key in sorted(set.intersection(*given.values())):
        if value_at(file.settings, key, absent) is not absent:
            raise ConfigError(f"{where}: {key} has no effect: every cell has its own from `sweep:`")
    groups = [key for entry in file.defaults if isinstance(entry, dict) for key in entry]
    if any(key.split()[-1].strip("/") == "ffn" for key in groups):
        raise ConfigError(f"{where}: ffn has no effect in defaults: sweep.methods names the layers")


def _refuse_varied(file: str, study: SweepConfig, overrides: Sequence[str]) -> None:
    """Raise `ConfigError` for an override of a key that the study varies, or of Hydra's own settings."""
    for key in overridden(overrides):
        if key.startswith(("hydra.", "hydra/")):
            raise ConfigError(f"{key}: a study may not change Hydra's own settings")
        if key in study.varied:
            part = "sweep.methods=, sweep.budgets= or sweep.seeds="
            raise ConfigError(f"{file} varies {key}: change it there, or choose a part of the study by {part}")


def _check_together(file: str, cells: Sequence[Cell]) -> None:
    """Raise `ConfigError` if two cells have one name, or two cells different corpora."""
    if len({corpus_folder(cell.config.data) for cell in cells}) > 1:
        raise ConfigError(f"{file} varies keys of data that make another corpus: a study has one corpus")
    names = Counter(cell.name for cell in cells)
    if twice := [name for name, n in names.items() if n > 1]:
        raise ConfigError(f"{file} describes {len(twice)} cells twice, {min(twice)} among them")


def count_cells(study: SweepConfig) -> int:
    """Number of cells of a study, including dropped ones; composes none of them."""
    return sum(
        len(row.sizes) * len(row.seeds or study.seeds) * math.prod(map(len, study.axes_of(method, row).values()))
        for method, row in itertools.product(study.methods, study.rows)
        if method in (row.methods or study.methods)
    )


def single_cell(composition: Composition, sweep: str = SINGLE) -> Cell:
    """The cell of one configuration."""
    config = parse_config(composition.tree)
    return _with_estimates([_cell(sweep, config, changes(composition, composed))])[0]


def state(cell: Cell, data_fingerprint: str) -> Status:
    """The status of a cell: dropped, pending (no record yet), or the status in its record.

    Raises:
        UserError: the folder holds a cell of another configuration.
    """
    if cell.plan.verdict is Verdict.DROP:
        return Status.DROPPED
    record = read_record(cell.folder)
    if record is None:
        return Status.PENDING
    check_same(cell, record, data_fingerprint)
    return record.status


def check_same(cell: Cell, record: Record, data_fingerprint: str | None) -> None:
    """Raise `UserError` if the record in a cell's folder has another configuration than the cell."""
    if found := differences(cell, record, data_fingerprint):
        raise UserError(
            f"{cell.folder} holds a run of another configuration: {'; '.join(found)}. "
            f"To keep it and go on: {set_aside(cell.folder)}"
        )


def how_to_rerun(cell: Cell) -> str:
    """How the user can run a failed or diverged cell again."""
    record = read_record(cell.folder)
    if record is not None and record.status is Status.DIVERGED:
        return f"to run it again anyway: {set_aside(cell.folder)}"
    return "the same command tries it again"


def pending_cells(cells: Sequence[Cell], data_fingerprint: str) -> list[Cell]:
    """The cells that are still to be run, longest first, so that the last ones to finish are short."""
    pending = [cell for cell in cells if state(cell, data_fingerprint) not in FINISHED]
    return sorted(pending, key=lambda cell: -cell.estimate_s)


def without_brackets(cells: Sequence[Cell]) -> list[Cell]:
    """The cells that do not bracket another cell's rate."""
    return [cell for cell in cells if cell.axes.get(RATE_FACTOR, 1) == 1]


def _cell(sweep: str, config: Config, axes: Mapping[str, Any]) -> Cell:
    manifest = read_manifest(config.data)
    values = {key: value_at(to_dict(config), key, value) for key, value in axes.items()}  # `0.02` for `.02`
    planned = plan(config, set_tokens=manifest.splits if manifest else None)
    return Cell(
        sweep=sweep,
        name=cell_name(config, values),
        axes=values,
        config=replace(config, trainer=replace(config.trainer, micro_batches=planned.micro_batches)),
        plan=planned,
        estimate_s=0.0,
        estimate_is_guess=True,
    )


def _with_estimates(cells: list[Cell]) -> list[Cell]:
    speeds = measured_speeds(cells[0].folder.parents[1])
    estimated = []
    for cell in cells:
        seconds, guess = estimate_s(cell.config, cell.plan, speeds)
        estimated.append(replace(cell, estimate_s=seconds, estimate_is_guess=guess))
    return estimated
