"""What a user should know about a study before its cells run, one line per notice."""

import math
from collections.abc import Sequence
from typing import Any

from peerscale.config.schema import Config
from peerscale.plan.cell import Cell
from peerscale.plan.cell_names import axes_label, budget_name
from peerscale.plan.cells import without_brackets
from peerscale.plan.plan import Plan, Verdict


def short_methods(cells: Sequence[Cell], min_sizes: int) -> list[str]:
    """Curves with fewer than `min_sizes` sizes left at a budget, one line each; rate brackets are no sizes."""
    left: dict[tuple[str, float], set[Any]] = {}
    for cell in without_brackets(cells):
        name = " ".join(filter(None, (cell.config.ffn.name, axes_label(cell.axes))))
        sizes = left.setdefault((name, cell.config.budget), set())
        if cell.plan.verdict is Verdict.OK:
            sizes.add(cell.config.size_name)
    return [
        f"{name} has {len(sizes)} size{'s' * (len(sizes) != 1)} left at {budget_name(budget)}, fewer than {min_sizes}"
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
    """`evaluation: validation 44,032 of 131,072 tokens asked; speeches: not in this corpus, skipped`."""
    parts = []
    for name, tokens in plan.evaluation.items():
        asked = config.data.evaluation[name]
        parts.append(f"{name} {tokens:,} tokens" if tokens == asked else f"{name} {tokens:,} of {asked:,} tokens asked")
    return f"evaluation: {'; '.join([*parts, *(f'{name}: {why}, skipped' for name, why in plan.skipped.items())])}"


def rate_lines(cells: Sequence[Cell]) -> list[str]:
    """A line if cells that are not dropped lie outside the runs that their law of learning rates was fitted to."""
    beyond = [beyond_law(cell.config, cell.plan.tokens) for cell in cells if cell.plan.verdict is Verdict.OK]
    names = ", ".join(dict.fromkeys(name for names in beyond for name in names))
    n = f"{sum(map(bool, beyond))} of {len(beyond)} cells"
    return [f"learning rate: {n} lie outside the runs that its law was fitted to, in {names}"] if names else []


def beyond_law(config: Config, tokens: int) -> list[str]:
    """The quantities in which a cell lies outside the runs that its laws of learning rates were fitted to."""
    law, of_tables = config.optim.lr_law, config.optim.table_lr_law
    places: dict[str, tuple[float, tuple[float, float]]] = {}
    if config.optim.lr_rule == "law" and law is not None:
        places = {
            "d_model": (config.d_model, law.fitted_d_model),
            "tokens": (tokens, law.fitted_tokens),
            "batch_sequences": (config.batch_sequences, law.fitted_batch_sequences),
            "steps": (tokens // config.tokens_per_step, (law.fewest_steps or 0, math.inf)),
        }
    if of_tables is not None and config.optim.table_lr is not None:
        places["tokens, for tables"] = (tokens, (0, of_tables.fitted_tokens[1]))
    return [name for name, (value, (low, high)) in places.items() if not low <= value <= high]
