"""A study's file -> its planned cells with their names."""

import itertools
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

from peerscale.config.compose import Composition, composed, leaves, of_cells, overridden, resolved, set_value, value_at
from peerscale.config.errors import ConfigError
from peerscale.config.schema import Config, parse_config, to_dict
from peerscale.config.study import RATE_FACTOR, Part, SweepConfig, load_sweep, part_of
from peerscale.config.study_file import StudyFile, read_study
from peerscale.data.store import folder as corpus_folder
from peerscale.data.store import read_manifest
from peerscale.data.text import texts
from peerscale.plan.cell import Cell
from peerscale.plan.cell_names import cell_name, changes
from peerscale.plan.memory import in_memory
from peerscale.plan.plan import plan

SECTION = object()
"""What a key has that is a whole section, which no value equals."""

SINGLE = "single"
"""The folder of cells that belong to no study."""


def planned_cells(sweep: str | Path | StudyFile, overrides: Sequence[str] = ()) -> list[Cell]:
    """Every cell of a study, including dropped ones, in the order of its file.

    Args:
        sweep: the study's name, its file, or the contents of that.
        overrides: further overrides of every cell; those of the `sweep` section, such as `sweep.budgets=[1e12]`,
            choose the part of the study that is planned.

    Raises:
        ConfigError: the study's file names an unknown method, size or key, or gives two cells one name.
    """
    file = sweep if isinstance(sweep, StudyFile) else read_study(sweep)
    where, study, words = file.path.name, load_sweep(file), of_cells(overrides)
    _refuse_without_effect(file, study, words)
    part = part_of(overrides)
    if wrong := {*(part.budgets or ())} - (budgets := {row.budget for row in study.grid}):
        there = ", ".join(f"{budget:g}" for budget in sorted(budgets))
        raise ConfigError(f"{where} has no budget {min(wrong):g}; there are {there}")
    points = [*study.points(part)]
    if not points:
        raise ConfigError(f"{where} has no cells in the part that {' '.join(overrides)} chooses")
    compose = partial(composed, study=file, resolve=False)
    cells: list[tuple[Config, dict[str, Any]]] = []
    for method, of_method in itertools.groupby(points, lambda point: point.method):
        composition = compose([f"ffn={method}", *words])
        changed, usual = changes(composition, compose) if words else {}, composition.tree
        for key, value in study.method_settings.get(method, {}).items():
            set_value(usual, key, value)
        for point in of_method:
            tree = deepcopy(usual)
            for key, value in point.keys.items():
                set_value(tree, key, value)
            # An axis of a row that takes its usual value is left out of the cell's name.
            unusual = {key: value for key, value in point.row_axes.items() if value_at(usual, key, SECTION) != value}
            config = parse_config(resolved(tree), f"{where}: {method}: ")
            cells.append((config, point.axes | unusual | changed))
    if (data := cells[0][0].data).train_tokens is None and read_manifest(data) is None:
        texts(data)  # raises for a wrong path now, not only when the corpus is prepared
    return _planned(file.path.stem, cells)


def _refuse_without_effect(file: StudyFile, study: SweepConfig, overrides: Sequence[str]) -> None:
    """Raise `ConfigError` for a key of the study's file, or of an override, whose value no cell would have."""
    if missing := [key for key, value in leaves(file.settings) if value == "???"]:  # which Hydra leaves out
        raise ConfigError(f"{file.path.name}: {missing[0]} has no value, only ???")
    given = [{*point.keys} for point in study.points(Part())]
    if both := {key for key, _ in leaves(file.settings)}.intersection(*given):
        raise ConfigError(f"{file.path.name}: {min(both)} has no effect: every cell has its own from `sweep:`")
    if both := {"ffn"}.union(*given, *study.method_settings.values()) & overridden(overrides).keys():
        part = "sweep.methods=, sweep.budgets= or sweep.seeds="
        raise ConfigError(f"{file.path.name} varies {min(both)}: change it there, or choose a part of it by {part}")


def single_cell(composition: Composition, sweep: str = SINGLE) -> Cell:
    """The cell of one configuration."""
    (cell,) = _planned(sweep, [(parse_config(composition.tree), changes(composition, composed))])
    return cell


def without_brackets(cells: Sequence[Cell]) -> list[Cell]:
    """The cells that do not bracket another cell's rate."""
    return [cell for cell in cells if cell.axes.get(RATE_FACTOR, 1) == 1]


def _planned(sweep: str, cells: Sequence[tuple[Config, Mapping[str, Any]]]) -> list[Cell]:
    """The plans of configurations with the axes of their names; cells that are given twice are planned once."""
    data = cells[0][0].data
    on = [(corpus_folder(c.data), c.data.val_set, c.data.evaluation[c.data.val_set]) for c, _ in cells]
    if on.count(on[0]) < len(on):
        raise ConfigError(f"{sweep} varies keys of data: a study has one corpus and one evaluation set")
    manifest = read_manifest(data)
    planned: dict[str, Cell] = {}
    for config, axes in cells:
        parsed = to_dict(config) if axes else {}
        values = {key: value_at(parsed, key, value) for key, value in axes.items()}  # `0.02` for `.02`
        run = plan(config, set_tokens=manifest.splits if manifest else None)
        fitted = in_memory(config)
        cell = Cell(sweep=sweep, name=cell_name(fitted, values), axes=values, config=fitted, plan=run)
        if planned.setdefault(cell.name, cell) != cell:
            raise ConfigError(f"{sweep} has two cells {cell.name}, which differ in keys that a name does not tell")
    return [*planned.values()]
