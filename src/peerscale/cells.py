"""A study's file -> its planned cells, each with its name; and which of them are still to be run."""

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from peerscale.cell_names import are_brackets, budget_name, cell_name
from peerscale.composition import Composition, of_cells, read_study, sweep_file
from peerscale.config import Config, composed, parse_config, to_dict
from peerscale.config_errors import ConfigError, layers_with, method_in, unknown_key
from peerscale.data.store import read_manifest
from peerscale.errors import UserError
from peerscale.files import OURS, ROOT
from peerscale.plan import Plan, Verdict, as_asked, beyond_law, decay_from, evaluation_line, in_micro_batches, plan
from peerscale.runs.record import NOT_HASHED, Record, Status, differences, read_record, set_aside
from peerscale.runs.speed import estimate_s, measured_speeds
from peerscale.sweep_config import GridRow, SweepConfig, load_sweep

SINGLE = "single"
"""The folder of cells that belong to no study."""

NAMED = ("ffn", "size", "budget", "seed")
"""Keys that have a place of their own in a cell's name; a study varies them by methods, grid and seeds."""

FINISHED = (Status.DONE, Status.DIVERGED, Status.DROPPED)
"""What a sweep leaves alone. A diverged cell would diverge again; `how_to_rerun` says what makes it a new one."""

UNNAMED = ("ffn.class", "ffn.method", "ffn.variant", "size", "budget", "seed")
"""Keys of these."""

CORPUS = ("data.name", "data.path", "data.source", "data.max_documents")
"""Keys that choose a corpus; a cell's name has them as one axis, `data=<name of the corpus>`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One planned run: all that a worker needs, wherever it is."""

    sweep: str
    name: str
    axes: dict[str, Any]
    """Dotted keys, and their values, besides method, size, budget and seed that tell this cell from others."""
    config: Config
    plan: Plan
    estimate_s: float
    estimate_is_guess: bool
    trunk: str = ""
    """The cell that leaves this one a checkpoint of what both have in common; empty: none."""
    branches: tuple[tuple[int, str], ...] = ()
    """Steps after which this cell leaves a checkpoint, and the cells that it is for."""

    @property
    def folder(self) -> Path:
        """`runs/<sweep>/<cell>`."""
        return ROOT / self.config.trainer.runs_directory / self.sweep / self.name


def planned_cells(sweep: str | Path, overrides: Sequence[str] = ()) -> list[Cell]:
    """Every cell of a study, dropped ones included, in the order of its file.

    Args:
        sweep: the study's name, or its file.
        overrides: further overrides of every cell; those of `sweep` itself, such as `sweep.budgets=[1e12]`, choose
            the part of the study that is planned.

    Raises:
        ConfigError: a study's file that names an unknown method, size or key, or describes a cell twice.
    """
    file = sweep_file(sweep)
    study, overrides = load_sweep(file, overrides), of_cells(overrides)
    _check_axes(file, study)
    for override in overrides:
        if re.match(r"hydra[./]", key := _key(override)):
            raise ConfigError(f"{override}: Hydra's own settings are not for a study")
        if key in {*NAMED, *(axis for _, axes in _all_axes(study) for axis in axes)}:
            raise ConfigError(f"{file.name} varies {key}; {_instead(key, override.partition('=')[2])}")
    # Composing takes 80 ms, so it is done once for each layer, not for each cell or size.
    compose = functools.cache(lambda *choice: composed(choice, sweep=file))
    of_size = [override for override in overrides if _key(override).startswith("size.")]
    plain = not of_size and not {"size", "defaults"} & {*read_study(file)}
    backbone = functools.cache(lambda size: (plain and _size(size)) or compose(f"size={size}", *of_size).tree["size"])
    cells: list[Cell] = []
    for method, row in itertools.product(study.methods, study.rows):
        if method not in (row.methods or study.methods):
            continue
        changed = _changes(compose(f"ffn={method}", *overrides), compose(f"ffn={method}"), compose)
        _refuse_axes_of_other_layers(file, study, method, row, method_in(compose(f"ffn={method}").tree))
        for size, (axes, row_axes, seed) in itertools.product(row.sizes, _values(study, method, row)):
            groups = {key: value for key, value in {**axes, **row_axes}.items() if (OURS / "conf" / key).is_dir()}
            usual = compose(f"ffn={method}", *(f"{key}={value}" for key, value in groups.items()), *overrides).tree
            tree = {**deepcopy(usual), "size": {**backbone(size)}, "budget": row.budget, "seed": seed}
            for key, value in {**axes, **row_axes}.items():
                if key not in groups:
                    _set(tree, key, value)
            # A value of a row that is the usual one makes no other cell.
            own = {key: value for key, value in row_axes.items() if key in groups or _get(usual, key) != value}
            cells.append(_cell(file.stem, parse_config(tree), {**axes, **own, **changed}))
    if study.branches:
        cells = _branched(file, cells)
    names = [cell.name for cell in cells]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"{file.name} describes {len(twice)} cells twice, {min(twice)} among them")
    return _with_estimates(cells)


def count_cells(study: SweepConfig) -> int:
    """How many cells a study has, dropped ones included; composes none of them."""
    pairs = itertools.product(study.methods, study.rows)
    taken = [(method, row) for method, row in pairs if method in (row.methods or study.methods)]
    return sum(len(row.sizes) * len([*_values(study, method, row)]) for method, row in taken)


def single_cell(composition: Composition, sweep: str = SINGLE) -> Cell:
    """The cell of one configuration."""
    config = parse_config(composition.tree)
    usual = composed([f"ffn={composition.choices['ffn']}"])
    changes = _changes(composition, usual, lambda *choice: composed(choice))
    return _with_estimates([_cell(sweep, config, changes)])[0]


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
    if found := differences(cell, record, data_fingerprint):
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


def in_turn(cells: Sequence[Cell]) -> list[tuple[Cell, ...]]:
    """The cells in groups, each of which one worker runs in turn: a trunk before its branches, most cells alone."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.trunk or cell.name, []).append(cell)
    return [tuple(sorted(members, key=lambda cell: bool(cell.trunk))) for members in groups.values()]


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


def without_brackets(cells: Sequence[Cell]) -> list[Cell]:
    """The cells that are no brackets of another cell's rate."""
    brackets = are_brackets([cell.config.ffn.name for cell in cells], [cell.axes for cell in cells])
    return [cell for cell, bracket in zip(cells, brackets, strict=True) if not bracket]


def short_methods(cells: Sequence[Cell], min_sizes: int) -> list[str]:
    """Methods with fewer sizes left at a budget than a parabola wants, one line each."""
    lines = []
    usual = without_brackets(cells)
    for name, budget in sorted({(cell.config.ffn.name, cell.config.budget) for cell in cells}):
        mine = [c for c in usual if (c.config.ffn.name, c.config.budget) == (name, budget)]
        left = {c.config.size for c in mine if c.plan.verdict is Verdict.OK}
        if len(left) < min_sizes:
            lines.append(f"{name} has {len(left)} sizes left at {budget_name(budget)}, fewer than {min_sizes}")
    return lines


def evaluation_lines(cells: Sequence[Cell], *, short_only: bool = False) -> list[str]:
    """What the cells that are not dropped are evaluated on; with `short_only` those lines that are not as asked."""
    kept = [cell for cell in cells if cell.plan.verdict is Verdict.OK]
    shown = [cell for cell in kept if not (short_only and as_asked(cell.config, cell.plan))]
    return list(dict.fromkeys(evaluation_line(cell.config, cell.plan) for cell in shown))


def rate_lines(cells: Sequence[Cell]) -> list[str]:
    """Which of the cells that are not dropped have a learning rate from beyond the runs that its law was fitted to."""
    beyond = [beyond_law(cell.config, cell.plan.tokens) for cell in cells if cell.plan.verdict is Verdict.OK]
    parts = []
    for name in dict.fromkeys(name for places in beyond for name in places):
        values = [places[name][0] for places in beyond if name in places]
        low, high = next(places[name][1] for places in beyond if name in places)
        between = f"{min(values):.3g}" if len({*values}) == 1 else f"{min(values):.3g} to {max(values):.3g}"
        parts.append(f"{name} {between} (fitted: {low:.3g} to {high:.3g})")
    n = sum(map(bool, beyond))
    return [f"learning rate: {n} of {len(beyond)} cells lie beyond the runs of its law: {'; '.join(parts)}"] * (n > 0)


def _size(name: str) -> dict[str, Any] | None:
    """The file of a size as it is, which spares composing it; None: there is none in our conf/."""
    path = OURS / "conf" / "size" / f"{name}.yaml"
    return yaml.safe_load(path.read_text()) if path.is_file() else None


def _cell(sweep: str, config: Config, axes: Mapping[str, Any]) -> Cell:
    config, manifest = in_micro_batches(config), read_manifest(config.data)
    values = {key: _get(to_dict(config), key, value) for key, value in axes.items()}  # 0.02 of an axis .02
    return Cell(
        sweep=sweep,
        name=cell_name(config, values),
        axes=values,
        config=config,
        plan=plan(config, set_tokens=manifest.set_tokens(config.context) if manifest else None),
        estimate_s=0.0,
        estimate_is_guess=True,
    )


def _branched(file: Path, cells: Sequence[Cell]) -> list[Cell]:
    """The cells of one model at several budgets as branches of the longest; raises `ConfigError` if they differ early.

    Until its rate falls, a shorter run is the longer one: same weights, same batches, same rates.
    """
    if not any(cell.config.optim.schedule == "wsd" for cell in cells):
        raise ConfigError(f"{file.name}: sweep.branches needs optim.schedule wsd")
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in (c for c in cells if c.config.optim.schedule == "wsd" and c.plan.verdict is Verdict.OK):
        groups.setdefault((cell.config.ffn.name, cell.config.size, cell.config.seed, repr(cell.axes)), []).append(cell)
    found = {}
    for members in groups.values():
        *shorter, longest = sorted(members, key=lambda cell: cell.plan.steps)
        if shorter and longest.config.optim.warmup_steps is None:
            raise ConfigError(f"{file.name}: sweep.branches needs optim.warmup_steps, as many for all budgets")
        if other := next((cell for cell in shorter if cell.plan.lr != longest.plan.lr), None):
            raise ConfigError(
                f"{file.name}: sweep.branches needs one learning rate for all budgets of a model, but {other.name} has "
                f"{other.plan.lr:.3g} and {longest.name} {longest.plan.lr:.3g}: optim.lr_rule may not be law"
            )
        found |= {cell.name: replace(cell, trunk=longest.name) for cell in shorter}
        leaves = tuple((decay_from(cell.config, cell.plan), cell.name) for cell in shorter)
        found[longest.name] = replace(longest, branches=leaves)
    return [found.get(cell.name, cell) for cell in cells]


def _with_estimates(cells: list[Cell]) -> list[Cell]:
    speeds = measured_speeds(ROOT / cells[0].config.trainer.runs_directory)
    estimated = []
    for cell in cells:
        seconds, guess = estimate_s(cell.config, cell.plan, speeds)
        if cell.trunk:
            seconds *= 1 - decay_from(cell.config, cell.plan) / cell.plan.steps
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


def _all_axes(study: SweepConfig) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every section of axes of a study, with its name in the file."""
    yield "axes", study.axes
    yield from ((f"method_axes.{method}", axes) for method, axes in study.method_axes.items())
    yield from ((f"grid.{number}.axes", row.axes) for number, row in enumerate(study.grid))


def _check_axes(file: Path, study: SweepConfig) -> None:
    """Refuse an axis that is no key, or no key of the layers that it is for; raises `ConfigError`."""
    for where, axes in _all_axes(study):
        for key in axes:
            if not re.fullmatch(r"[a-zA-Z_][\w.]*", key) or key.partition(".")[0] in ("hydra", "sweep", "slurm"):
                raise ConfigError(f"{file.name}: {where}: {key!r} is not a key that a study can vary, such as optim.lr")
            if key in NAMED:
                raise ConfigError(f"{file.name}: {where}: {key} is what methods, grid and seeds vary")


def _refuse_axes_of_other_layers(file: Path, study: SweepConfig, method: str, row: GridRow, layer: str | None) -> None:
    """Raise `ConfigError` for an axis of `method` that its `layer` does not have."""
    for where, axes in (
        ("axes", study.axes), ("method_axes", study.method_axes.get(method, {})), ("axes of the grid", row.axes)
    ):  # fmt: skip
        for key, values in axes.items():
            if (owners := layers_with(key)) and layer not in owners:
                raise ConfigError(
                    f"{file.name}: {where}: {method} has no {key}, only {', '.join(owners)}; name it for those, "
                    f"such as method_axes: {{{owners[-1]}: {{{key}: {values}}}}}"
                )


def _values(study: SweepConfig, method: str, row: GridRow) -> Iterator[tuple[dict[str, Any], dict[str, Any], int]]:
    """For each cell of a size: its values of the study's axes, those of the row's axes, and its seed."""
    common = {**study.axes, **study.method_axes.get(method, {})}
    for values in itertools.product(*common.values()):
        for row_values in itertools.product(*row.axes.values()):
            for seed in row.seeds or study.seeds:
                axes = dict(zip(common, values, strict=True)), dict(zip(row.axes, row_values, strict=True))
                yield (*axes, seed)


def _changes(composition: Composition, usual: Composition, compose: Callable[..., Composition]) -> dict[str, Any]:
    """How a configuration departs from its layer's usual one, where that matters and its name has no place for it."""
    chosen = {
        group: choice
        for group, choice in composition.choices.items()
        if group not in (*NAMED, *NOT_HASHED) and choice != usual.choices.get(group)
    }
    if chosen:
        words = (f"{group}={choice}" for group, choice in chosen.items())
        usual = compose(f"ffn={composition.choices['ffn']}", *words)
    leaves, usual_leaves = (dict(_leaves(each.tree)) for each in (composition, usual))
    axes = {key: choice for key, choice in chosen.items() if key != "data"}
    for key, value in leaves.items():
        if key not in usual_leaves or usual_leaves[key] != value:
            axes["data" if key in CORPUS else key] = value
    if "data" in chosen or "data" in axes:
        axes["data"] = parse_config(composition.tree).data.corpus_name
    return axes


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys and values of a configuration that can make a cell another one."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in (*NOT_HASHED, *UNNAMED) and key not in CORPUS:
            continue
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def _get(tree: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """The value at a dotted key; `default` where there is none, or a whole section."""
    value: Any = tree
    for name in key.split("."):
        value = value.get(name, default) if isinstance(value, Mapping) else default
    return default if isinstance(value, Mapping) else value


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set the value at a dotted key; raises `ConfigError` where the sections that lead to it are not there."""
    *sections, name = key.split(".")
    for section in sections:
        if not isinstance(inner := tree.get(section), dict):
            raise ConfigError(unknown_key(key, Config))
        tree = inner
    tree[name] = value
