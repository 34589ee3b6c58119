"""A sweep file -> planned cells -> pending cells, longest first."""

import functools
import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from peerscale.composition import sweep_file
from peerscale.config import Config, load
from peerscale.config_errors import ConfigError, layers_with, one_line
from peerscale.data.store import read_manifest
from peerscale.errors import UserError
from peerscale.files import ROOT
from peerscale.plan import Plan, Verdict, as_asked, evaluation_line, plan
from peerscale.runs.record import NOT_HASHED, Record, Status, differences, read_record, set_aside
from peerscale.runs.speed import estimate_s, measured_speeds
from peerscale.sweep_config import SweepConfig, load_sweep, of_sweep

SINGLE = "single"
"""The folder of cells that belong to no study."""

STUDY_OVERRIDES: list[str] = []
"""Overrides of the study that this process runs. Hydra does not see them: it would apply them to the default layer."""

PUBLISHED = "sweep.published="
"""Override that names a folder of published studies, as results/: cells finished there are not run again. It is for
the sweep, not for its cells, which never see it."""

WORDS = ("null", "true", "false", "nan", "inf")
"""Words that Hydra does not read as texts."""

NAMED = ("ffn", "size", "budget", "seed")
"""Overrides that have a place of their own in a cell's name."""

FINISHED = (Status.DONE, Status.DIVERGED, Status.DROPPED)
"""What a sweep leaves alone. A diverged cell would diverge again; `how_to_rerun` says what makes it a new one."""

OPERATIONAL = ("hydra", *(key for key in NOT_HASHED if key != "data.path"))
"""Overrides that don't change a cell's name, since they don't change its result; but another text is another corpus."""

CORPUS = ("data", "data.name", "data.path", "data.source", "data.max_documents")
"""Overrides that choose a corpus; a cell's name has them as one axis, `data=<name of the corpus>`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One planned run of a study."""

    sweep: str
    name: str
    overrides: tuple[str, ...]
    config: Config
    plan: Plan
    estimate_s: float
    estimate_is_guess: bool

    @property
    def folder(self) -> Path:
        return cell_folder(self.config, self.sweep, self.name)


def split_published(words: Sequence[str]) -> tuple[list[str], str | None]:
    """Overrides of a sweep without `PUBLISHED`, and the folder that it names; None if it is not among them."""
    others = [word for word in words if not word.lstrip("+").startswith(PUBLISHED)]
    named = [word.partition("=")[2] for word in words if word not in others]
    return others, named[-1] if named else None


def cell_folder(config: Config, sweep: str, cell: str) -> Path:
    """`runs/<sweep>/<cell>`."""
    return ROOT / config.trainer.runs_directory / sweep / cell


def cell_name(config: Config, overrides: Sequence[str]) -> str:
    """`<method>-<size>-<budget>[-<axis>=<value>...]-s<seed>`; every other override that matters is an axis.

    A value is written as the configuration holds it, so that 2e-2 and .02 name one cell.
    """
    axes = {}
    for override in overrides:
        key, value = _key(override), override.partition("=")[2]
        if key in CORPUS:
            axes["data"] = f"data={_file_name(config.data.corpus_name)}"
        elif key not in NAMED and not any(key == o or key.startswith((f"{o}.", f"{o}/")) for o in OPERATIONAL):
            axes[key] = f"{key.rsplit('.', 1)[-1]}={_file_name(_canonical(config, key, value))}"
    return "-".join([config.ffn.name, config.size.name, budget_name(config.budget), *axes.values(), f"s{config.seed}"])


def _canonical(config: Config, key: str, text: str) -> str:
    """The value that `config` has for `key`; for a group of conf/, `text`, the name of the file that was chosen."""
    value: Any = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else getattr(value, name, None)
    return text if is_dataclass(value) else _hydra_value(value)


def budget_name(budget: float) -> str:
    """`3e11`."""
    mantissa, exponent = f"{budget:.6e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def planned_cells(sweep: str | Path, overrides: Sequence[str] = ()) -> list[Cell]:
    """Every cell of a study, dropped ones included, in the order of its file.

    Args:
        sweep: the study's name, or its file.
        overrides: further overrides of every cell; those of `sweep` itself, such as `sweep.budgets=[1e12]`, choose
            the part of the study that is planned.

    Raises:
        ConfigError: a sweep file that names an unknown method, size or key, or describes a cell twice.
    """
    file = sweep_file(sweep)
    study = load_sweep(file, overrides)
    overrides = [override for override in overrides if not of_sweep(override)]
    compose = functools.cache(lambda *choice: load(choice, sweep=file))
    own_axes = {*study.axes, *(axis for axes in study.method_axes.values() for axis in axes)}
    own = {*NAMED, *own_axes}
    for override in overrides:
        if (key := _key(override)) in map(_key, own):
            raise ConfigError(f"{file.name} varies {key}; {_instead(key, override.partition('=')[2])}")
    for key in sorted(own - {*NAMED}):
        if not re.fullmatch(r"\+{0,2}[a-zA-Z_][\w.]*", key) or _key(key).partition(".")[0] in ("hydra", "sweep"):
            raise ConfigError(f"{file.name}: axes: {key!r} is not a key that a study can vary, such as optim.lr")
    if named := {*NAMED} & own_axes:
        raise ConfigError(f"{file.name}: axes: {min(named)} is what methods, grid and seeds vary")
    for method in study.methods:
        _check_layer_axes(file, study, method, compose)
    size_overrides = [o for o in overrides if _key(o).startswith("size.")]
    cells: list[Cell] = []
    for method, row in itertools.product(study.methods, study.rows):
        for size, axes, seed in itertools.product(row.sizes, _axis_overrides(study, method), row.seeds or study.seeds):
            # Composing takes 50 ms, so it is done once for each layer and once for each size, not for each cell:
            # a size file says nothing but `size`, and budget and seed are plain numbers.
            base = compose(f"ffn={method}", f"size={study.grid[0].sizes[0]}", *axes, *overrides)
            backbone = compose(f"size={size}", *size_overrides, *(a for a in axes if a.startswith("size."))).size
            try:
                config = replace(base, size=backbone, budget=row.budget, seed=seed)
            except ValidationError as error:
                raise ConfigError(one_line(error.errors()[0], Config)) from None
            choice = (f"ffn={method}", f"size={size}", f"budget={row.budget!r}", f"seed={seed}", *axes, *overrides)
            cells.append(_cell(file.stem, config, choice))
    names = [cell.name for cell in cells]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"{file.name} describes {len(twice)} cells twice, {min(twice)} among them")
    return _with_estimates(cells)


def count_cells(study: SweepConfig) -> int:
    """How many cells a study has, dropped ones included; composes none of them."""
    per_seed = [len(row.sizes) * len(row.seeds or study.seeds) for row in study.rows]
    return sum(per_seed) * sum(len(_axis_overrides(study, method)) for method in study.methods)


def single_cell(config: Config, overrides: Sequence[str], sweep: str = SINGLE) -> Cell:
    """The cell of one configuration."""
    return _with_estimates([_cell(sweep, config, tuple(overrides))])[0]


def state(cell: Cell, data_fingerprint: str) -> Status:
    """Where a cell stands: dropped, pending (no record yet), or what its record says.

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
    """Refuse to mix two configurations in one folder."""
    if found := differences(cell.config, record, data_fingerprint):
        raise UserError(
            f"{cell.folder} holds a run of another configuration: {'; '.join(found)}. "
            f"To keep it and go on: {set_aside(cell.folder)}"
        )


def how_to_rerun(cell: Cell) -> str:
    """What to type for a cell that ended badly to be run again."""
    record = read_record(cell.folder)
    if record is not None and record.status is Status.DIVERGED:
        return f"to run it again all the same: {set_aside(cell.folder)}"
    return "the same command tries it again"


def pending_cells(cells: Sequence[Cell], data_fingerprint: str) -> list[Cell]:
    """The cells that are still to be run, longest first, so that the last ones to finish are short."""
    pending = [cell for cell in cells if state(cell, data_fingerprint) not in FINISHED]
    return sorted(pending, key=lambda cell: -cell.estimate_s)


def diverged_lines(cells: Sequence[Cell], data_fingerprint: str) -> list[str]:
    """The cells that a sweep leaves alone because they diverged, one line each: why, and how to run them again."""
    return [
        f"{cell.name} diverged: {record.reason}; {how_to_rerun(cell)}"
        for cell in cells
        if state(cell, data_fingerprint) is Status.DIVERGED and (record := read_record(cell.folder))
    ]


def short_methods(cells: Sequence[Cell], min_sizes: int) -> list[str]:
    """Methods with fewer sizes left at a budget than a parabola wants, one line each."""
    lines = []
    for name, budget in sorted({(cell.config.ffn.name, cell.config.budget) for cell in cells}):
        mine = [c for c in cells if (c.config.ffn.name, c.config.budget) == (name, budget)]
        left = {c.config.size for c in mine if c.plan.verdict is Verdict.OK}
        if len(left) < min_sizes:
            lines.append(f"{name} has {len(left)} sizes left at {budget_name(budget)}, fewer than {min_sizes}")
    return lines


def evaluation_lines(cells: Sequence[Cell], *, short_only: bool = False) -> list[str]:
    """What the cells that are not dropped are evaluated on; with `short_only` those lines that are not as asked."""
    kept = [cell for cell in cells if cell.plan.verdict is Verdict.OK]
    shown = [cell for cell in kept if not (short_only and as_asked(cell.config, cell.plan))]
    return list(dict.fromkeys(evaluation_line(cell.config, cell.plan) for cell in shown))


def _cell(sweep: str, config: Config, overrides: tuple[str, ...]) -> Cell:
    return Cell(
        sweep=sweep,
        name=cell_name(config, overrides),
        overrides=overrides,
        config=config,
        plan=plan(config, set_tokens=manifest.splits if (manifest := read_manifest(config.data)) else None),
        estimate_s=0.0,
        estimate_is_guess=True,
    )


def _with_estimates(cells: list[Cell]) -> list[Cell]:
    speeds = measured_speeds(ROOT / cells[0].config.trainer.runs_directory)
    estimated = []
    for cell in cells:
        seconds, guess = estimate_s(cell.config, cell.plan, speeds)
        estimated.append(replace(cell, estimate_s=seconds, estimate_is_guess=guess))
    return estimated


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def _instead(key: str, value: str) -> str:
    """What to do in place of overriding a key that the study varies."""
    lists = {"ffn": "methods", "budget": "budgets", "seed": "seeds"}
    if key in lists:
        return f"use sweep.{lists[key]}=[{value}]"
    where = "sizes are in the grid" if key == "size" else "values are in the axes"
    return f"its {where} of its sweep section: edit them there"


def _check_layer_axes(file: Path, study: SweepConfig, method: str, compose: Callable[..., Config]) -> None:
    """Refuse an axis of the layer that the layer of `method` does not have; raises `ConfigError`."""
    for where, axes in (("axes", study.axes), ("method_axes", study.method_axes.get(method, {}))):
        for key, values in ((_key(axis), values) for axis, values in axes.items()):
            layer = compose(f"ffn={method}").ffn.method  # first: a layer outside peerscale is known from then on
            owners = layers_with(key)
            if owners and layer not in owners:
                raise ConfigError(
                    f"{file.name}: {where}: {method} has no {key}, only {', '.join(owners)}; name it for those, "
                    f"such as method_axes: {{{owners[-1]}: {{{key}: {values}}}}}"
                )


def _axis_overrides(study: SweepConfig, method: str) -> list[tuple[str, ...]]:
    axes = {**study.axes, **study.method_axes.get(method, {})}
    return [
        tuple(f"{key}={_hydra_value(value)}" for key, value in zip(axes, values, strict=True))
        for values in itertools.product(*axes.values())
    ]


def _hydra_value(value: Any) -> str:
    """A value as Hydra's override grammar reads it back; texts are quoted, or they could hold further overrides."""
    match value:
        case str() if re.fullmatch(r"[a-zA-Z_][\w./-]*", value) and value.lower() not in WORDS:
            return value
        case str():
            # Only a backslash before a quote, or before the end, is special inside quotes.
            return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value) + "'"
        case list():
            return f"[{','.join(map(_hydra_value, value))}]"
        case dict():
            return "{" + ",".join(f"{key}:{_hydra_value(inner)}" for key, inner in value.items()) + "}"
    return json.dumps(value)


def _file_name(value: str) -> str:
    return "".join(c if c.isalnum() or c in "._+-" else "_" for c in value).strip("_")
