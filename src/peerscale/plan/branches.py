"""Runs of one model at several budgets that share their common steps (`sweep.branches`)."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peerscale.config.errors import ConfigError
from peerscale.plan.plan import Verdict, decay_from

if TYPE_CHECKING:
    from peerscale.plan.cells import Cell


def branched(file: Path, cells: Sequence["Cell"]) -> list["Cell"]:
    """Make the shorter runs of each model branches of its longest run; raises `ConfigError` if their starts differ.

    Until its learning rate decays, a shorter run equals the longer one: same weights, same batches, same rates.
    """
    if not any(cell.config.optim.schedule == "wsd" for cell in cells):
        raise ConfigError(f"{file.name}: sweep.branches needs optim.schedule wsd")
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in (c for c in cells if c.config.optim.schedule == "wsd" and c.plan.verdict is Verdict.OK):
        config = cell.config  # a row's batch is in no axis
        key = (config.ffn.name, config.size, config.seed, config.batch_sequences, repr(cell.axes))
        groups.setdefault(key, []).append(cell)
    found = {}
    for members in groups.values():
        *shorter, longest = sorted(members, key=lambda cell: cell.plan.steps)
        if shorter and longest.config.optim.warmup_steps is None:
            raise ConfigError(f"{file.name}: sweep.branches needs optim.warmup_steps, the same for all budgets")
        if other := next((cell for cell in shorter if cell.plan.lr != longest.plan.lr), None):
            raise ConfigError(
                f"{file.name}: sweep.branches needs one learning rate for all budgets of a model, but {other.name} has "
                f"{other.plan.lr:.3g} and {longest.name} {longest.plan.lr:.3g}: optim.lr_rule may not be law"
            )
        found |= {cell.name: replace(cell, trunk=longest.name) for cell in shorter}
        leaves = tuple((decay_from(cell.config, cell.plan), cell.name) for cell in shorter)
        found[longest.name] = replace(longest, branches=leaves)
    return [found.get(cell.name, cell) for cell in cells]


def in_turn(cells: Sequence["Cell"]) -> list[tuple["Cell", ...]]:
    """Groups of cells that one worker runs in turn: a trunk and then its branches; other cells are alone."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.trunk or cell.name, []).append(cell)
    return [tuple(sorted(members, key=lambda cell: bool(cell.trunk))) for members in groups.values()]
