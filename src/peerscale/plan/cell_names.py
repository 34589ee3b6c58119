"""Names of cells: `<method>-<size>-<budget>[-<axis>=<value>...]-s<seed>`. For people; programs read records."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from peerscale.config.compose import Composition, leaves, resolved
from peerscale.config.schema import NOT_HASHED, Config, parse_config
from peerscale.config.study import RATE_FACTOR

TOLD_ELSEWHERE = (
    "d_model", "head_dim", "n_layers", "budget", "seed", "ffn.class", "ffn.method", "ffn.variant",
)  # fmt: skip
"""Keys of a configuration that never become axes, since a cell's name holds their values elsewhere."""

CORPUS = ("data.name", "data.path", "data.source")
"""Keys that choose a corpus; in a cell's name they are one axis, `data=<name of the corpus>`."""


def cell_name(config: Config, axes: Mapping[str, Any]) -> str:
    """The name of a cell; `axes` are the dotted keys that distinguish it besides method, size, budget and seed."""
    parts = [config.ffn.name, config.size_name, budget_name(config.budget), axes_label(axes), f"s{config.seed}"]
    return "-".join(part for part in parts if part)


def axes_label(axes: Mapping[str, Any]) -> str:
    """`top_k=8-lr=0.001`: each axis is named by the last part of its key."""
    return "-".join(f"{key.rpartition('.')[2]}={_file_name(value)}" for key, value in axes.items())


def are_brackets(methods: Sequence[str], axes: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Which cells bracket the rate of another: those with the axis `RATE_FACTOR`.

    If all cells of a method have that axis, none of them is a bracket: there it is an axis like any other.
    """
    usual = {method for method, each in zip(methods, axes, strict=True) if RATE_FACTOR not in each}
    return [method in usual and RATE_FACTOR in each for method, each in zip(methods, axes, strict=True)]


def budget_name(budget: float) -> str:
    """`3e11`."""
    mantissa, exponent = f"{budget:.6e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def changes(composition: Composition, compose: Callable[[list[str]], Composition]) -> dict[str, Any]:
    """The keys in which a configuration differs from its layer's usual one, except those that a name tells elsewhere.

    `compose` gives the configuration with some overrides alone.
    """
    layer = f"ffn={composition.choices['ffn']}"
    usual = compose([layer])
    chosen = {
        group: choice
        for group, choice in composition.choices.items()
        if group not in ("ffn", *NOT_HASHED) and choice != usual.choices.get(group)
    }
    if chosen:
        usual = compose([layer, *(f"{group}={choice}" for group, choice in chosen.items())])
    axes: dict[str, Any] = {group: choice for group, choice in chosen.items() if group != "data"}
    without = {*NOT_HASHED, *TOLD_ELSEWHERE} - {*CORPUS}
    usual_values = dict(leaves(usual.tree, without))
    for key, value in leaves(composition.tree, without):
        if key not in usual_values or usual_values[key] != value:
            axes["data" if key in CORPUS else key] = value
    if "data" in chosen or "data" in axes:
        axes["data"] = parse_config(resolved(composition.tree)).data.corpus_name
    return axes


def _file_name(value: Any) -> str:
    """A value, with characters that file names cannot hold replaced."""
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    return "".join(c if c.isalnum() or c in "._+-" else "_" for c in text).strip("_")
