"""The budgets that a cell can have: large enough for `min_steps`, small enough for its corpus."""

import decimal
import itertools
import math

from peerscale.config.schema import Config


def unusable_budget(
    config: Config, flops_per_token: int, train_tokens: int | None, steps: int, warmup_steps: int
) -> str:
    """Why the run is too short or too long at its budget, and the nearest budget that is possible; empty if neither."""
    per_step, max_epochs = config.tokens_per_step, config.data.max_epochs
    fewest, most = _fewest_steps(config), int(max_epochs * train_tokens) // per_step if train_tokens else None
    if fewest is None:
        return "optim.warmup_fraction 1 leaves no step after warm-up"
    too_long = most is not None and steps > most
    if steps < config.min_steps:
        problem = f"{steps:,} step{' is' if steps == 1 else 's are'} fewer than min_steps {config.min_steps:,}"
    elif warmup_steps >= steps:
        problem = f"warm-up of {warmup_steps:,} step{'' if warmup_steps == 1 else 's'} leaves no step to train"
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
    """Fewest steps that reach `min_steps` and leave a step after warm-up; None if warm-up always takes all steps."""
    if config.optim.warmup_steps:
        return max(config.min_steps, config.optim.warmup_steps + 1)
    after_warmup = 1 - config.optim.warmup_fraction
    return max(config.min_steps, 2, math.floor(0.5 / after_warmup) + 1) if after_warmup else None


def _in_few_digits(flops: int, smallest: int, largest: int | None) -> str:
    """One end of a range of budgets, rounded into the range to two digits, or to more if the range is narrow."""
    rounding = decimal.ROUND_FLOOR if flops == largest else decimal.ROUND_CEILING
    for digits in itertools.count(2):
        rounded = decimal.Context(prec=digits, rounding=rounding).create_decimal(flops)
        if smallest <= rounded and (largest is None or rounded <= largest):
            return f"{rounded.normalize():e}".replace("e+", "e")
    raise AssertionError
