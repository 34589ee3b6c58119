"""What a user should know about a study before its cells run, one line per notice."""

import math
from collections.abc import Sequence
from typing import Any

from peerscale.config.schema import Config
from peerscale.plan.cell_names import axes_label, budget_name
from peerscale.plan.cells import Cell, how_to_rerun, state, without_brackets
from peerscale.plan.plan import Plan, Verdict
from peerscale.records.record import Status, read_record


def diverged_lines(cells: Sequence[Cell], data_fingerprint: str) -> list[str]:
    """The cells that a sweep does not run again because they diverged, one line each: why, and how to run them."""
    return [
        f"{cell.name} diverged: {record.reason}; {how_to_rerun(cell)}"
        for cell in cells
        if state(cell, data_fingerprint) is Status.DIVERGED and (record := read_record(cell.folder))
    ]


def short_methods(cells: Sequence[Cell], min_sizes: int) -> list[str]:
    """Curves with fewer than `min_sizes` sizes left at a budget, one line each."""
    left: dict[tuple[str, float], set[Any]] = {}
    for cell in without_brackets(cells):
        name = " ".join(filter(None, (cell.config.ffn.name, axes_label(cell.axes))))
        sizes = left.setdefault((name, cell.config.budget), set())
        if cell.plan.verdict is Verdict.OK:
            sizes.add(cell.config.size_name)
    return [
        f"{name} has {len(sizes)} sizes left at {budget_name(budget)}, fewer than {min_sizes}"
        for (name, budget), sizes in sorted(left.items(), key=lambda pair: pair[0])
        if len(sizes) < min_sizes
    ]


def evaluation_lines(cells: Sequence[Cell], *, short_only: bool = False) -> list[str]:
    """What the cells that are not dropped are evaluated on; `short_only` omits cells evaluated as `data` asks."""
    kept = [cell for cell in cells if cell.plan.verdict is Verdict.OK]
    shown = [cell for cell in kept if not (short_only and as_asked(cell.config, cell.plan))]
    return list(dict.fromkeys(evaluation_line(cell.config, cell.plan) for cell in shown))


def as_asked(config: Config, plan: Plan) -> bool:
    """Whether every held-out set is evaluated on as many tokens as `data.evaluation` asks."""
    return plan.evaluation == {name: asked for name, asked in config.data.evaluation.items() if asked}


def evaluation_line(config: Config, plan: Plan) -> str:
    """`evaluation: validation 44,032 of 131,072 tokens asked; speeches, wikipedia: not in this corpus, skipped`."""
    parts = []
    for name, tokens in plan.evaluation.items():
        asked = config.data.evaluation[name]
        parts.append(f"{name} {tokens:,} tokens" if tokens == asked else f"{name} {tokens:,} of {asked:,} tokens asked")
    for why in dict.fromkeys(plan.skipped.values()):
        parts.append(f"{', '.join(name for name in plan.skipped if plan.skipped[name] == why)}: {why}, skipped")
    return f"evaluation: {'; '.join(parts)}"


def rate_lines(cells: Sequence[Cell]) -> list[str]:
    """A line if cells that are not dropped lie outside the range of the runs that their law of rates was fitted to."""
    beyond = [beyond_law(cell.config, cell.plan.tokens) for cell in cells if cell.plan.verdict is Verdict.OK]
    parts = []
    for name in dict.fromkeys(name for places in beyond for name in places):
        values = [places[name][0] for places in beyond if name in places]
        low, high = next(places[name][1] for places in beyond if name in places)
        between = f"{min(values):.3g}" if len({*values}) == 1 else f"{min(values):.3g} to {max(values):.3g}"
        parts.append(f"{name} {between} (fitted: {f'{low:.3g} to {high:.3g}' if high < math.inf else f'from {low}'})")
    n = sum(map(bool, beyond))
    said = f"learning rate: {n} of {len(beyond)} cells lie outside the range that its law was fitted to"
    return [f"{said}: {'; '.join(parts)}"] * (n > 0)


def beyond_law(config: Config, tokens: int) -> dict[str, tuple[float, tuple[float, float]]]:
    """Quantities in which a cell lies outside the runs that its `lr_law` was fitted to: its value, and their range."""
    law = config.optim.lr_law
    if config.optim.lr_rule != "law" or law is None:
        return {}
    places = {
        "d_model": (config.d_model, law.fitted_d_model),
        "tokens": (tokens, law.fitted_tokens),
        "batch_sequences": (config.batch_sequences, law.fitted_batch_sequences),
        "steps": (tokens // config.tokens_per_step, (law.fewest_steps or 0, math.inf)),
    }
    return {name: place for name, place in places.items() if not place[1][0] <= place[0] <= place[1][1]}
