"""Which held-out sets a cell is evaluated on, on how many tokens of each, and why other sets are skipped."""

from collections.abc import Mapping

from peerscale.config.schema import Config
from peerscale.data.batches import whole_batches


def evaluated_tokens(config: Config, set_tokens: Mapping[str, int] | None) -> dict[str, int]:
    """Tokens of each held-out set to evaluate on: what `data.evaluation` asks for, or what the set has if that is less.

    Only whole batches count. Without `set_tokens`, the sets are assumed to be large enough.
    """
    tokens = {}
    for name, asked in config.data.evaluation.items():
        n_batches = asked // config.tokens_per_step
        if set_tokens is not None:
            n_batches = min(n_batches, _batches(config, set_tokens.get(name, 0)))
        if n_batches:
            tokens[name] = n_batches * config.tokens_per_step
    return tokens


def skipped_sets(config: Config, set_tokens: Mapping[str, int] | None) -> dict[str, str]:
    """The held-out sets that `data.evaluation` names and that are not evaluated, and why."""
    evaluated, skipped = evaluated_tokens(config, set_tokens), {}
    for name, asked in config.data.evaluation.items():
        if asked and name not in evaluated:
            too_few = set_tokens is None or name in set_tokens
            skipped[name] = f"fewer tokens than {_needed(config)}" if too_few else "not in this corpus"
    return skipped


def unusable_data(config: Config, set_tokens: Mapping[str, int] | None) -> str:
    """Why there is no batch to train or to evaluate on; empty if there is."""
    if why := skipped_sets(config, set_tokens).get(config.data.val_set):
        return f"data.val_set {config.data.val_set}: {why}"
    # No two sequences of a training batch are neighbours in the text, so that it takes the text of two batches.
    if set_tokens is not None and _batches(config, set_tokens["train"]) < 2:
        return f"the train set has {set_tokens['train']:,} tokens, fewer than {_needed(config, 2)}"
    return ""


def _batches(config: Config, n_tokens: int) -> int:
    return whole_batches(n_tokens, batch_sequences=config.batch_sequences, context=config.context)


def _needed(config: Config, fewest: int = 1) -> str:
    tokens = fewest * config.tokens_per_step + 1
    return f"the {tokens:,} that a batch of {config.batch_sequences} x {config.context} needs"
