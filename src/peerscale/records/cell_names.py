"""Names of cells: `<method>-<size>-<budget>[-<axis>=<value>...]-s<seed>`. For people; programs read records."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from peerscale.config.schema import Config

RATE_FACTOR = "optim.lr_factor"
"""The axis of cells that bracket a learning rate: the same cell at a multiple of its rate."""


def cell_name(config: Config, axes: Mapping[str, Any]) -> str:
    """The name of a cell; `axes` are the dotted keys that distinguish it besides method, size, budget and seed."""
    parts = [config.ffn.name, config.size.name, budget_name(config.budget), axes_label(axes), f"s{config.seed}"]
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


def _file_name(value: Any) -> str:
    """A value, with characters that file names cannot hold replaced."""
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    return "".join(c if c.isalnum() or c in "._+-" else "_" for c in text).strip("_")
