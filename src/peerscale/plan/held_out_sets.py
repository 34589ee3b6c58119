"""Which held-out sets a cell is evaluated on, on how many tokens of each, and why other sets are skipped."""

from collections.abc import Mapping

from peerscale.config.schema import Config
from peerscale.data.batches import whole_batches


def evaluated_tokens(config: Config, set_tokens: Mapping[str, int] | None) -> dict[str, int]:
    """Tokens of each held-out set to evaluate on: what `data.evaluation` asks for, or what the set has if that is less.

    Only whole batches count; sets smaller than one batch are left out.
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
    """The held-out sets that `data.evaluation` names and the corpus cannot serve, and why."""
    if set_tokens is None:
        return {}
    return {
        name: f"fewer tokens than {_needed(config)}" if name in set_tokens else "not in this corpus"
        for name, asked in config.data.evaluation.items()
        if asked and not _batches(config, set_tokens.get(name, 0))
    }


def unusable_data(config: Config, set_tokens: Mapping[str, int] | None) -> str:
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
    # No two sequences of a training batch are neighbours in the text, so that it takes the text of two batches.
    for name, fewest in (("train", 2), (config.data.val_set, 1)):
        if _batches(config, set_tokens[name]) < fewest:
            needed = _needed(config, fewest)
            return f"the {name} set of this corpus has {set_tokens[name]:,} tokens, fewer than {needed}"
    return ""


def _batches(config: Config, n_tokens: int) -> int:
    return whole_batches(n_tokens, batch_sequences=config.batch_sequences, context=config.context)


def _needed(config: Config, fewest: int = 1) -> str:
    tokens = fewest * config.tokens_per_step + 1
    return f"the {tokens:,} that a batch of {config.batch_sequences} x {config.context} needs"
