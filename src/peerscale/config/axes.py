"""The axes of a study: the keys that distinguish its cells besides method, size, budget and seed."""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from peerscale.config.compose import Composition
from peerscale.config.errors import ConfigError, layers_with, unknown_key
from peerscale.config.schema import Config, parse_config
from peerscale.config.study import GridRow, SweepConfig
from peerscale.records.fingerprint import NOT_HASHED

NAMED = ("ffn", "size", "budget", "seed")
"""Keys that have their own place in a cell's name; a study varies them through methods, grid and seeds."""

TOLD_ELSEWHERE = ("ffn.class", "ffn.method", "ffn.variant", "size", "budget", "seed")
"""Keys of a composed configuration that never become axes, since a cell's name holds their values elsewhere."""

CORPUS = ("data.name", "data.path", "data.source")
"""Keys that choose a corpus; in a cell's name they are one axis, `data=<name of the corpus>`."""


def check_axes(file: Path, study: SweepConfig) -> None:
    """Raise `ConfigError` for an axis that is not a key of the cells' configuration, or is one of `NAMED`."""
    for where, axes in all_axes(study):
        for key in axes:
            if not re.fullmatch(r"[a-zA-Z_][\w.]*", key) or key.partition(".")[0] in ("hydra", "sweep", "slurm"):
                raise ConfigError(f"{file.name}: {where}: {key!r} is not a key that a study can vary, such as optim.lr")
            if key in NAMED:
                raise ConfigError(f"{file.name}: {where}: {key} is varied by methods, grid and seeds, not by axes")


def refuse_axes_of_other_layers(file: Path, study: SweepConfig, method: str, row: GridRow, layer: str | None) -> None:
    """Raise `ConfigError` for an axis of `method` that its `layer` does not have."""
    for where, axes in (
        ("axes", study.axes), ("method_axes", study.method_axes.get(method, {})), ("axes of the grid", row.axes)
    ):  # fmt: skip
        for key, values in axes.items():
            if (owners := layers_with(key)) and layer not in owners:
                raise ConfigError(
                    f"{file.name}: {where}: {method} has no {key}, only {', '.join(owners)}; vary it for those, "
                    f"such as method_axes: {{{owners[-1]}: {{{key}: {values}}}}}"
                )


def axis_values(study: SweepConfig, method: str, row: GridRow) -> Iterator[tuple[dict[str, Any], dict[str, Any], int]]:
    """For each cell of a size: its values of the study's axes, its values of the row's axes, and its seed."""
    common = {**study.axes, **study.method_axes.get(method, {})}
    for values in itertools.product(*common.values()):
        for row_values in itertools.product(*row.axes.values()):
            for seed in row.seeds or study.seeds:
                axes = dict(zip(common, values, strict=True)), dict(zip(row.axes, row_values, strict=True))
                yield (*axes, seed)


def changes(composition: Composition, usual: Composition, compose: Callable[..., Composition]) -> dict[str, Any]:
    """The keys in which a configuration differs from its layer's usual one, except `NAMED` and `NOT_HASHED` keys."""
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


def value_at(tree: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """The value at a dotted key; `default` if there is none or it is a whole section."""
    value: Any = tree
    for name in key.split("."):
        value = value.get(name, default) if isinstance(value, Mapping) else default
    return default if isinstance(value, Mapping) else value


def set_value(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set the value at a dotted key; raises `ConfigError` if a section that it needs does not exist."""
    *sections, name = key.split(".")
    for section in sections:
        if not isinstance(inner := tree.get(section), dict):
            raise ConfigError(unknown_key(key, Config))
        tree = inner
    tree[name] = value


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys of a configuration that can distinguish cells, with their values."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in (*NOT_HASHED, *TOLD_ELSEWHERE) and key not in CORPUS:
            continue
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def all_axes(study: SweepConfig) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every section of axes of a study, with its name in the file."""
    yield "axes", study.axes
    yield from ((f"method_axes.{method}", axes) for method, axes in study.method_axes.items())
    yield from ((f"grid.{number}.axes", row.axes) for number, row in enumerate(study.grid))


def overridden_key(override: str) -> str:
    """`optim.lr` of `+optim.lr=0.01`."""
    return override.lstrip("+~").partition("=")[0]


def instead_of_override(key: str, value: str) -> str:
    """What to do instead of overriding a key that the study varies."""
    lists = {"ffn": "methods", "budget": "budgets", "seed": "seeds"}
    if key in lists:
        return f"use sweep.{lists[key]}=[{value}]"
    where = "sizes are in the grid" if key == "size" else "values are in the grid or the axes"
    return f"its {where} of its sweep section: edit them there"
