"""From a configuration and its budget to steps, tokens and learning rates, or a reason to drop the cell."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from peerscale.accounting import Cost, cost, expert_choice_capacity
from peerscale.config import Config, MoeConfig, RetrievalConfig

REFERENCE_WIDTH = 32
"""d_model at which `OptimConfig.lr` is meant."""

BUDGET_TOLERANCE = 0.005
"""Largest relative distance of achieved FLOPs from the budget; 200 steps or more keep it by rounding."""


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
    steps: int
    tokens: int
    epochs: float | None
    """Passes over the training tokens; None while their number is not known."""
    warmup_steps: int
    lr: float
    table_lr: float | None
    evaluation_tokens: int

    @property
    def flops(self) -> int:
        """Training FLOPs that the cell will have used."""
        return self.tokens * self.cost.flops_per_token

    @property
    def tokens_per_param(self) -> float:
        return self.tokens / self.cost.params_total


def plan(config: Config, *, train_tokens: int | None = None) -> Plan:
    """Derive the run from its budget.

    Args:
        config: the cell.
        train_tokens: tokens of the prepared corpus; else those that `config.data` names count.
    """
    model = cost(config)
    train_tokens = train_tokens or config.data.train_tokens
    # 1) The budget over the cost of a step is the number of steps: batch and context are the study's.
    steps = round(config.budget / (model.flops_per_token * config.tokens_per_step))
    tokens = steps * config.tokens_per_step
    # 2) Everything tied to the length of the run follows from that.
    warmup_steps = max(1, round(config.optim.warmup_fraction * steps))
    epochs = tokens / train_tokens if train_tokens else None
    reason = _reason_to_drop(config, steps, warmup_steps, epochs)
    if not reason:
        achieved = tokens * model.flops_per_token / config.budget
        assert abs(achieved - 1) <= BUDGET_TOLERANCE or config.min_steps < 1 / BUDGET_TOLERANCE, achieved
    return Plan(
        verdict=Verdict.DROP if reason else Verdict.OK,
        reason=reason,
        cost=model,
        steps=steps,
        tokens=tokens,
        epochs=epochs,
        warmup_steps=warmup_steps,
        lr=LR_RULES[config.optim.lr_rule](config.optim.lr, config.size.d_model),
        table_lr=config.optim.table_lr,
        evaluation_tokens=sum(config.data.evaluation.values()),
    )


def schedule(config: Config, plan: Plan, step: int) -> float:
    """Factor on every learning rate at `step`, counted from 0: linear warm-up, then a cosine that ends with the run."""
    if step < plan.warmup_steps:
        return (step + 1) / plan.warmup_steps
    progress = (step - plan.warmup_steps) / max(1, plan.steps - plan.warmup_steps)
    floor = config.optim.final_lr_fraction
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _constant(lr: float, d_model: int) -> float:
    return lr


def _inverse_sqrt_width(lr: float, d_model: int) -> float:
    return lr * math.sqrt(REFERENCE_WIDTH / d_model)


LR_RULES: dict[str, Callable[[float, int], float]] = {
    "constant": _constant,
    "inverse_sqrt_width": _inverse_sqrt_width,
}


def _reason_to_drop(config: Config, steps: int, warmup_steps: int, epochs: float | None) -> str:
    if steps < config.min_steps:
        return f"{steps} steps < min_steps {config.min_steps}"
    if warmup_steps >= steps:
        return f"warm-up of {warmup_steps} steps leaves none of {steps}"
    if epochs is not None and epochs > config.data.max_epochs:
        return f"{epochs:.2f} epochs > max_epochs {config.data.max_epochs:g}"
    if config.batch_sequences % config.trainer.devices:
        allowed = [str(n) for n in range(1, config.batch_sequences + 1) if config.batch_sequences % n == 0]
        return (
            f"{config.batch_sequences} sequences cannot be shared by trainer.devices {config.trainer.devices}; "
            f"allowed: {', '.join(allowed)}"
        )
    n_rows = config.ffn.n_experts if isinstance(config.ffn, RetrievalConfig) else 0
    if config.trainer.shard_tables and n_rows % config.trainer.devices:
        return f"tables of {n_rows} rows cannot be sharded evenly over trainer.devices {config.trainer.devices}"
    if isinstance(config.ffn, MoeConfig) and config.ffn.routing == "expert_choice":
        ffn, sequences = config.ffn, config.batch_sequences
        if expert_choice_capacity(sequences, ffn.capacity_factor, ffn.n_experts) is None:
            return (
                f"expert choice needs a whole capacity in 1..{sequences}: {sequences} sequences x "
                f"{ffn.capacity_factor:g} / {ffn.n_experts} experts = "
                f"{sequences * ffn.capacity_factor / ffn.n_experts:g}"
            )
    return ""
