"""A study's file -> its planned cells with their names, and which of them are still to be run."""

import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from peerscale.config.axes import (
    NAMED,
    all_axes,
    axis_values,
    changes,
    check_axes,
    instead_of_override,
    overridden_key,
    refuse_axes_of_other_layers,
    set_value,
    value_at,
)
from peerscale.config.compose import Composition, of_cells, read_study, sweep_file
from peerscale.config.errors import ConfigError, method_in
from peerscale.config.schema import Config, composed, parse_config, to_dict
from peerscale.config.study import SweepConfig, load_sweep
from peerscale.data.store import folder as corpus_folder
from peerscale.data.store import read_manifest
from peerscale.errors import UserError
from peerscale.files import OURS, ROOT
from peerscale.plan.branches import branched
from peerscale.plan.memory import in_micro_batches
from peerscale.plan.plan import Plan, Verdict, decay_from, plan
from peerscale.records.cell_names import are_brackets, cell_name
from peerscale.records.record import Record, Status, differences, read_record, set_aside
from peerscale.records.speed import estimate_s, measured_speeds

SINGLE = "single"
"""The folder of cells that belong to no study."""

FINISHED = (Status.DONE, Status.DIVERGED, Status.DROPPED)
"""Cells that a sweep does not run again. A diverged cell would diverge again; see `how_to_rerun`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One planned run: all that a worker needs, on any machine."""

    sweep: str
    name: str
    axes: dict[str, Any]
    """Dotted keys and values that, besides method, size, budget and seed, distinguish this cell from others."""
    config: Config
    plan: Plan
    estimate_s: float
    estimate_is_guess: bool
    trunk: str = ""
    """The cell whose checkpoint this one starts from, since they share their first steps; empty: none."""
    branches: tuple[tuple[int, str], ...] = ()
    """Steps after which this cell leaves a checkpoint, each with the cell that starts from it."""

    @property
    def folder(self) -> Path:
        """`runs/<sweep>/<cell>`."""
        return ROOT / Path(self.config.trainer.runs_directory).expanduser() / self.sweep / self.name


def planned_cells(sweep: str | Path, overrides: Sequence[str] = ()) -> list[Cell]:
    """Every cell of a study, including dropped ones, in the order of its file.

    Args:
        sweep: the study's name, or its file.
        overrides: further overrides of every cell; those of the `sweep` section, such as `sweep.budgets=[1e12]`,
            choose the part of the study that is planned.

    Raises:
        ConfigError: the study's file names an unknown method, size or key, or describes a cell twice.
    """
    file = sweep_file(sweep)
    study, overrides = load_sweep(file, overrides), of_cells(overrides)
    check_axes(file, study)
    of_rows = ["batch_sequences"] if any(row.batch_sequences for row in study.grid) else []
    varied = {*NAMED, *of_rows, *(axis for _, axes in all_axes(study) for axis in axes)}
    for override in overrides:
        if re.match(r"hydra[./]", key := overridden_key(override)):
            raise ConfigError(f"{override}: a study may not change Hydra's own settings")
        if key.partition(".")[0] == "sweep":
            raise ConfigError(f"{override}: the keys of a study are changed one by one: sweep.KEY=VALUE")
        if key in varied:
            raise ConfigError(f"{file.name} varies {key}; {instead_of_override(key, override.partition('=')[2])}")
    fixed = {key: value for key, value in read_study(file).items() if key not in ("sweep", "defaults")}
    for key in re.findall(r"\$\{([\w.]+)\}", f"{fixed} {overrides}"):
        if {key, key.partition(".")[0]} & varied:
            raise ConfigError(
                f"{file.name}: ${{{key}}} would not follow the study, which varies {key}: write the value"
            )
    # Composing takes 80 ms, so it is done once per layer, not once per cell or size.
    compose = functools.cache(lambda *choice: composed(choice, sweep=file))
    of_size = [override for override in overrides if overridden_key(override).startswith("size.")]
    plain = not of_size and not {"size", "defaults"} & {*read_study(file)}
    backbone = functools.cache(lambda size: (plain and _size(size)) or compose(f"size={size}", *of_size).tree["size"])
    cells: list[Cell] = []
    for method, row in itertools.product(study.methods, study.rows):
        if method not in (row.methods or study.methods):
            continue
        changed = changes(compose(f"ffn={method}", *overrides), compose(f"ffn={method}"), compose)
        if compose(f"ffn={method}").tree["size"] != compose().tree["size"]:
            raise ConfigError(
                f"{file.name}: the file of {method} in conf/ffn sets size, which the grid of a study decides"
            )
        refuse_axes_of_other_layers(file, study, method, row, method_in(compose(f"ffn={method}").tree))
        for size, (axes, row_axes, seed) in itertools.product(row.sizes, axis_values(study, method, row)):
            groups = {key: value for key, value in {**axes, **row_axes}.items() if (OURS / "conf" / key).is_dir()}
            usual = compose(f"ffn={method}", *(f"{key}={value}" for key, value in groups.items()), *overrides).tree
            tree = {**deepcopy(usual), "size": {**backbone(size)}, "budget": row.budget, "seed": seed}
            if row.batch_sequences:
                tree["batch_sequences"] = row.batch_sequences
            for key, value in {**axes, **row_axes}.items():
                if key not in groups:
                    set_value(tree, key, value)
            # An axis of a row that takes its usual value is left out of the cell's name.
            own = {key: value for key, value in row_axes.items() if key in groups or value_at(usual, key) != value}
            cells.append(_cell(file.stem, parse_config(tree), {**axes, **own, **changed}))
    if study.branches:
        cells = branched(file, cells)
    names = [cell.name for cell in cells]
    if len({corpus_folder(cell.config.data) for cell in cells}) > 1:
        raise ConfigError(f"{file.name} varies keys of data that make another corpus: a study has one corpus")
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"{file.name} describes {len(twice)} cells twice, {min(twice)} among them")
    return _with_estimates(cells)


def count_cells(study: SweepConfig) -> int:
    """Number of cells of a study, including dropped ones; composes none of them."""
    pairs = itertools.product(study.methods, study.rows)
    taken = [(method, row) for method, row in pairs if method in (row.methods or study.methods)]
    return sum(len(row.sizes) * len([*axis_values(study, method, row)]) for method, row in taken)


def single_cell(composition: Composition, sweep: str = SINGLE) -> Cell:
    """The cell of one configuration."""
    config = parse_config(composition.tree)
    usual = composed([f"ffn={composition.choices['ffn']}"])
    changed = changes(composition, usual, lambda *choice: composed(choice))
    return _with_estimates([_cell(sweep, config, changed)])[0]


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
    brackets = are_brackets([cell.config.ffn.name for cell in cells], [cell.axes for cell in cells])
    return [cell for cell, bracket in zip(cells, brackets, strict=True) if not bracket]


def _size(name: str) -> dict[str, Any] | None:
    """The contents of a size's file, read without Hydra to save time; None if our conf/ has no such file."""
    path = OURS / "conf" / "size" / f"{name}.yaml"
    return yaml.safe_load(path.read_text()) if path.is_file() else None


def _cell(sweep: str, config: Config, axes: Mapping[str, Any]) -> Cell:
    config, manifest = in_micro_batches(config), read_manifest(config.data)
    values = {key: value_at(to_dict(config), key, value) for key, value in axes.items()}  # `0.02` for `.02`
    return Cell(
        sweep=sweep,
        name=cell_name(config, values),
        axes=values,
        config=config,
        plan=plan(config, set_tokens=manifest.splits if manifest else None),
        estimate_s=0.0,
        estimate_is_guess=True,
    )


def _with_estimates(cells: list[Cell]) -> list[Cell]:
    speeds = measured_speeds(cells[0].folder.parents[1])
    estimated = []
    for cell in cells:
        seconds, guess = estimate_s(cell.config, cell.plan, speeds)
        if cell.trunk:
            seconds *= 1 - decay_from(cell.config, cell.plan) / cell.plan.steps
        estimated.append(replace(cell, estimate_s=seconds, estimate_is_guess=guess))
    return estimated
