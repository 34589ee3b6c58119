"""From a configuration and its budget to steps, tokens and learning rates, or a reason to drop the cell."""

import decimal
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from peerscale.accounting import Cost, cost, device_memory
from peerscale.config import FROM_FILES, TABLE_1_SETS, Config
from peerscale.data.batches import fewest_tokens, whole_batches

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
    evaluation: dict[str, int]
    """Tokens of each held-out set that the cell is evaluated on."""
    skipped: dict[str, str]
    """Held-out sets that `data.evaluation` names and the corpus cannot serve, and why."""

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
        set_tokens: tokens of each set of the prepared corpus, as its manifest says. Without them `data.train_tokens`
            counts, and the held-out sets are taken to be as large as `data.evaluation` asks.
    """
    config, model = in_micro_batches(config), cost(config)
    train_tokens = config.data.train_tokens if set_tokens is None else set_tokens["train"]
    # 1) The budget over the cost of a step is the number of steps: batch and context are the study's.
    steps = round(config.budget / (model.flops_per_token * config.tokens_per_step))
    tokens = steps * config.tokens_per_step
    # 2) Everything tied to the length of the run follows from that.
    warmup_steps = config.optim.warmup_steps or max(1, round(config.optim.warmup_fraction * steps))
    epochs = tokens / train_tokens if train_tokens else None
    reason = (
        _unusable_data(config, set_tokens)
        or _indivisible(config)
        or config.ffn.unusable(config.surroundings)
        or _too_large(config)
        or _unusable_budget(config, model.flops_per_token, train_tokens, steps, warmup_steps)
    )
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
        lr=config.optim.lr * config.optim.lr_factor * lr_scale(config, tokens),
        table_lr=config.optim.table_lr,
        evaluation=evaluated_tokens(config, set_tokens),
        skipped=_skipped(config, set_tokens),
    )


def evaluated_tokens(config: Config, set_tokens: Mapping[str, int] | None) -> dict[str, int]:
    """Tokens of each held-out set to evaluate on: what `data.evaluation` asks, or the set has, in whole batches.

    Sets of less than one batch are left out.
    """
    tokens, skipped = {}, _skipped(config, set_tokens)
    for name, asked in config.data.evaluation.items():
        n_batches = asked // config.tokens_per_step
        if set_tokens is not None:
            n_batches = min(n_batches, _batches(config, name, set_tokens))
        if n_batches and name not in skipped:
            tokens[name] = n_batches * config.tokens_per_step
    return tokens


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


def batch_shape(config: Config, name: str) -> dict[str, Any]:
    """What `EvaluationBatches` of a set are told.

    Sets of Table 1 are small, so that neighbours may stand in a batch: no model was trained on such batches, nor has
    learned to look into the next row.
    """
    shape = {"batch_sequences": config.batch_sequences, "context": config.context}
    return {**shape, "apart": name not in TABLE_1_SETS}


def schedule(config: Config, plan: Plan, step: int) -> float:
    """Factor on every learning rate at `step`, counted from 0: linear warm-up, then a fall that ends with the run.

    `cosine` falls from the end of warm-up on, `wsd` in a straight line from `decay_from` on.
    """
    if step < plan.warmup_steps:
        return (step + 1) / plan.warmup_steps
    start = plan.warmup_steps if config.optim.schedule == "cosine" else decay_from(config, plan)
    progress = min(1.0, max(0, step - start) / max(1, plan.steps - start))
    left = 0.5 * (1 + math.cos(math.pi * progress)) if config.optim.schedule == "cosine" else 1 - progress
    floor = config.optim.final_lr_fraction
    return floor + (1 - floor) * left


def decay_from(config: Config, plan: Plan) -> int:
    """The steps of a run with `wsd` before its rate falls."""
    return max(plan.warmup_steps, plan.steps - max(1, round(config.optim.decay_fraction * plan.steps)))


def lr_scale(config: Config, tokens: int) -> float:
    """What `optim.lr_rule` multiplies the peak rate by in a cell of so many training tokens."""
    law = config.optim.lr_law
    match config.optim.lr_rule:
        case "inverse_sqrt_width":
            return math.sqrt(REFERENCE_WIDTH / config.size.d_model)
        case "law" if law is not None:
            by_width = (config.size.d_model / law.reference_d_model) ** -law.width_exponent
            by_tokens = (max(tokens, 1) / law.reference_tokens) ** -law.tokens_exponent
            by_batch = (config.batch_sequences / law.reference_batch_sequences) ** law.batch_exponent
            return min(by_width * by_tokens * by_batch, (law.largest_lr or math.inf) / config.optim.lr)
    return 1.0


def beyond_law(config: Config, tokens: int) -> dict[str, tuple[float, tuple[float, float]]]:
    """Where a cell lies outside the runs that its `lr_law` was fitted to: its value, and the range of the runs."""
    law = config.optim.lr_law
    if config.optim.lr_rule != "law" or law is None:
        return {}
    places = {
        "d_model": (config.size.d_model, law.fitted_d_model),
        "tokens": (tokens, law.fitted_tokens),
        "batch_sequences": (config.batch_sequences, law.fitted_batch_sequences),
    }
    return {name: place for name, place in places.items() if not place[1][0] <= place[0] <= place[1][1]}


def _batches(config: Config, name: str, set_tokens: Mapping[str, int]) -> int:
    return whole_batches(set_tokens.get(name, 0), **batch_shape(config, name))


def _skipped(config: Config, set_tokens: Mapping[str, int] | None) -> dict[str, str]:
    skipped = {}
    for name in (name for name, asked in config.data.evaluation.items() if asked):
        if name in FROM_FILES and not config.data.held_out.get(name) and name not in (set_tokens or {}):
            skipped[name] = "not on the hub, only from files in data.held_out"
        elif set_tokens is not None and not _batches(config, name, set_tokens):
            skipped[name] = f"fewer tokens than {_needed(config, name)}" if name in set_tokens else "not in this corpus"
    return skipped


def _needed(config: Config, name: str) -> str:
    fewest = fewest_tokens(**batch_shape(config, name))
    return f"the {fewest:,} that a batch of {config.batch_sequences} x {config.context} needs"


def _unusable_data(config: Config, set_tokens: Mapping[str, int] | None) -> str:
    """Why there is no batch to train or to evaluate on; empty if there is."""
    for name, asked in config.data.evaluation.items():
        if 0 < asked < config.tokens_per_step:
            return (
                f"data.evaluation.{name} asks for {asked:,} tokens, but one batch of {config.batch_sequences} x "
                f"{config.context} has {config.tokens_per_step:,}"
            )
    if set_tokens is None:
        return ""
    if config.data.val_set not in set_tokens:
        there = ", ".join(name for name in set_tokens if name != "train")
        return f"data.val_set {config.data.val_set} is not in this corpus, whose held-out sets are {there}"
    for name in ("train", config.data.val_set):
        if not _batches(config, name, set_tokens):
            return f"the {name} set of this corpus has {set_tokens[name]:,} tokens, fewer than {_needed(config, name)}"
    return ""


def _indivisible(config: Config) -> str:
    """Why a batch cannot be divided as the configuration asks; empty if it can."""
    if config.batch_sequences % config.trainer.devices:
        allowed = [str(n) for n in range(1, config.batch_sequences + 1) if config.batch_sequences % n == 0]
        return (
            f"{config.batch_sequences} sequences cannot be shared by trainer.devices {config.trainer.devices}; "
            f"allowed: {', '.join(allowed)}"
        )
    sequences = config.routing_group_sequences or config.batch_sequences
    here, parts = config.batch_sequences // config.trainer.devices, config.surroundings.micro_batches
    if here % parts:
        return f"the {here} sequences of a device cannot be divided into trainer.micro_batches {parts}"
    if config.batch_sequences % sequences:
        return f"routing_group_sequences {sequences} does not divide batch_sequences {config.batch_sequences}"
    if sequences < config.batch_sequences and here % sequences:
        return f"routing_group_sequences {sequences} does not divide the {here} sequences of a device"
    if parts > 1 and config.ffn.takes_statistics and (here // parts) % sequences:
        return (
            f"{config.ffn.name} takes statistics over {sequences} sequences, which trainer.micro_batches {parts} "
            f"divides; routing_group_sequences may be {here // parts} or a divisor of that"
        )
    return ""


def _too_large(config: Config) -> str:
    """Why a cell does not fit its GPUs, and what would make it fit; empty if it does, or none are used."""
    room = config.trainer.device_memory_gb
    if config.trainer.accelerator != "gpu" or room is None or (needed := _memory_gb(config)) <= room:
        return ""
    problem = f"{needed:.3g} GB are more than trainer.device_memory_gb {room:g}"
    free = replace(config, trainer=replace(config.trainer, micro_batches=None))
    smaller = in_micro_batches(free)
    if (fits := _memory_gb(smaller)) <= room:
        return f"{problem}; trainer.micro_batches={smaller.trainer.micro_batches} would take {fits:.3g}"
    recomputed = in_micro_batches(replace(free, trainer=replace(free.trainer, activation_checkpointing=True)))
    if (fits := _memory_gb(recomputed)) <= room:
        return f"{problem}; trainer.activation_checkpointing=true would take {fits:.3g}, and more time"
    of_state = device_memory(config)["state"] / 1e9
    hint = "; smaller routing_group_sequences allow more of them" if config.ffn.takes_statistics else ""
    return f"{problem}, {of_state:.3g} of them weights and moments; no trainer.micro_batches is enough{hint}"


def in_micro_batches(config: Config) -> Config:
    """The configuration with its number of micro-batches, where `trainer.micro_batches` leaves that to the plan.

    It is the smallest that divides the batch as the layer allows and fits the memory of the device; 1 if none does.
    """
    if config.trainer.micro_batches is not None:
        return config
    here, room = config.batch_sequences // config.trainer.devices, config.trainer.device_memory_gb
    some = [
        replace(config, trainer=replace(config.trainer, micro_batches=parts)) for parts in range(1, max(1, here) + 1)
    ]
    if config.trainer.accelerator == "gpu" and room is not None:
        return next((each for each in some if not _indivisible(each) and _memory_gb(each) <= room), some[0])
    return some[0]


def _memory_gb(config: Config) -> float:
    return sum(device_memory(config).values()) / 1e9


def _unusable_budget(
    config: Config, flops_per_token: int, train_tokens: int | None, steps: int, warmup_steps: int
) -> str:
    """Why the budget gives too short or too long a run, and the nearest budget that does not; empty if it does not."""
    per_step, max_epochs = config.tokens_per_step, config.data.max_epochs
    fewest, most = _fewest_steps(config), int(max_epochs * train_tokens) // per_step if train_tokens else None
    if fewest is None:
        return "optim.warmup_fraction 1 leaves no step after warm-up"
    too_long = most is not None and steps > most
    if steps < config.min_steps:
        problem = f"{steps:,} step{' is' if steps == 1 else 's are'} fewer than min_steps {config.min_steps:,}"
    elif warmup_steps >= steps:
        problem = f"warm-up of {warmup_steps:,} step{'' if warmup_steps == 1 else 's'} leaves none to train"
    elif train_tokens and too_long:
        epochs = math.ceil(round(100 * steps * per_step / train_tokens, 6)) / 100
        problem = f"{epochs:,.2f} epochs are more than data.max_epochs {max_epochs:g}"
    else:
        return ""
    if train_tokens and most is not None and most < fewest:
        return (
            f"{problem}: no budget fits, since {fewest:,} steps take {fewest * per_step:,} tokens and "
            f"data.max_epochs {max_epochs:g} allows {int(max_epochs * train_tokens):,}"
        )
    smallest, largest = fewest * per_step * flops_per_token, None if most is None else most * per_step * flops_per_token
    if too_long and largest is not None:
        return f"{problem}: the largest budget for this cell is {_in_few_digits(largest, smallest, largest)}"
    return f"{problem}: the smallest budget for this cell is {_in_few_digits(smallest, smallest, largest)}"


def _fewest_steps(config: Config) -> int | None:
    """Steps of the shortest run that has `min_steps` and some after warm-up; None if warm-up takes all of any run."""
    if config.optim.warmup_steps:
        return max(config.min_steps, config.optim.warmup_steps + 1)
    after_warmup = 1 - config.optim.warmup_fraction
    return max(config.min_steps, 2, math.floor(0.5 / after_warmup) + 1) if after_warmup else None


def _in_few_digits(flops: int, smallest: int, largest: int | None) -> str:
    """One end of a range of budgets, rounded into the range: to two digits, or more where the range is narrow."""
    rounding = decimal.ROUND_FLOOR if flops == largest else decimal.ROUND_CEILING
    for digits in itertools.count(2):
        rounded = decimal.Context(prec=digits, rounding=rounding).create_decimal(flops)
        if smallest <= rounded and (largest is None or rounded <= largest):
            return f"{rounded.normalize():e}".replace("e+", "e")
    raise AssertionError
