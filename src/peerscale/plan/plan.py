"""From a configuration and its budget to steps, tokens and learning rates, or a reason to drop the cell."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from peerscale.config.schema import Config
from peerscale.plan.cost import Cost, cost
from peerscale.plan.held_out_sets import evaluated_tokens, skipped_sets, unusable_data
from peerscale.plan.memory import in_memory, indivisible, too_large

REFERENCE_WIDTH = 32
"""d_model at which `lr_rule: inverse_sqrt_width` takes `optim.lr` as it is."""


class Verdict(StrEnum):
    OK = "OK"
    DROP = "DROP"


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a cell will do, known before it is started."""

    verdict: Verdict
    reason: str
    """Why the cell is dropped; empty if it is not."""
    cost: Cost
    micro_batches: int
    """Parts in which a device computes its share of a batch."""
    steps: int
    tokens: int
    epochs: float | None
    """Passes over the training tokens; None if their number is not known yet."""
    warmup_steps: int
    lr: float
    table_lr: float | None
    evaluation: dict[str, int]
    """Tokens of each held-out set that the cell is evaluated on."""
    skipped: dict[str, str]
    """Held-out sets that `data.evaluation` names but the corpus cannot provide, and why."""

    @property
    def evaluation_tokens(self) -> int:
        return sum(self.evaluation.values())

    @property
    def flops(self) -> int:
        """Training FLOPs that the cell will have used."""
        return self.tokens * self.cost.flops_per_token

    @property
    def tokens_per_param(self) -> float:
        return self.tokens / self.cost.params_total


def plan(config: Config, *, set_tokens: Mapping[str, int] | None = None) -> Plan:
    """Derive the run from its budget.

    Args:
        config: the cell.
        set_tokens: tokens of each set of the prepared corpus, from its manifest. None: `data.train_tokens` is used, and
            the held-out sets are assumed to be as large as `data.evaluation` asks.
    """
    config, model = in_memory(config), cost(config)
    train_tokens = config.data.train_tokens if set_tokens is None else set_tokens["train"]
    # The budget divided by the cost of a step; the study fixes batch and context.
    steps = round(config.budget / (model.flops_per_token * config.tokens_per_step))
    tokens = steps * config.tokens_per_step
    parts = config.surroundings.micro_batches
    reason = (
        unusable_data(config, set_tokens)
        or indivisible(config, parts)
        or config.ffn.unusable(config.surroundings)
        or too_large(config)
        or _unusable_budget(config, model.flops_per_token, train_tokens, steps)
    )
    return Plan(
        verdict=Verdict.DROP if reason else Verdict.OK,
        reason=reason,
        cost=model,
        micro_batches=parts,
        steps=steps,
        tokens=tokens,
        epochs=tokens / train_tokens if train_tokens else None,
        warmup_steps=min(max(1, round(config.optim.warmup_fraction * steps)), max(0, steps - 1)),
        lr=config.optim.lr * config.optim.lr_factor * lr_scale(config, tokens),
        table_lr=table_lr(config, tokens),
        evaluation=evaluated_tokens(config, set_tokens),
        skipped=skipped_sets(config, set_tokens),
    )


def schedule(config: Config, plan: Plan, step: int) -> float:
    """Factor on every learning rate at `step`, counted from 0: linear warm-up, then a cosine that ends with the run."""
    if step < plan.warmup_steps:
        return (step + 1) / plan.warmup_steps
    progress = min(1.0, max(0, step - plan.warmup_steps) / max(1, plan.steps - plan.warmup_steps))
    left = 0.5 * (1 + math.cos(math.pi * progress))
    floor = config.optim.final_lr_fraction
    return floor + (1 - floor) * left


def lr_scale(config: Config, tokens: int) -> float:
    """Factor of `optim.lr_rule` on the peak rate of a cell that trains on `tokens`."""
    law = config.optim.lr_law
    match config.optim.lr_rule:
        case "inverse_sqrt_width":
            return math.sqrt(REFERENCE_WIDTH / config.d_model)
        case "law" if law is not None:
            by_width = (config.d_model / law.reference_d_model) ** -law.width_exponent
            by_tokens = (max(tokens, 1) / law.reference_tokens) ** -law.tokens_exponent
            by_batch = (config.batch_sequences / law.reference_batch_sequences) ** law.batch_exponent
            return min(by_width * by_tokens * by_batch, (law.largest_lr or math.inf) / config.optim.lr)
    return 1.0


def table_lr(config: Config, tokens: int) -> float | None:
    """Peak rate of the expert tables of a cell that trains on `tokens`; None: it has none of its own."""
    usual, law = config.optim.table_lr, config.optim.table_lr_law
    if usual is None or law is None:
        return usual
    longer = max(1.0, min(tokens, law.fitted_tokens[1]) / law.reference_tokens)
    return usual * longer**-law.tokens_exponent


def _unusable_budget(config: Config, flops_per_token: int, train_tokens: int | None, steps: int) -> str:
    """Why the run is too short or too long at its budget, and about which budget is possible; empty if neither."""
    tokens, max_epochs = steps * config.tokens_per_step, config.data.max_epochs
    if steps < config.min_steps:
        smallest = config.min_steps * config.tokens_per_step * flops_per_token
        few = f"too few steps, {steps:,} of min_steps {config.min_steps:,}"
        return f"{few}: the smallest budget for this cell is about {smallest:.2e}"
    if train_tokens and tokens > max_epochs * train_tokens:
        largest = max_epochs * train_tokens * flops_per_token
        many = f"{tokens / train_tokens:,.4g} epochs are more than data.max_epochs {max_epochs:g}"
        return f"{many}: the largest budget for this cell is about {largest:.2e}"
    return ""
