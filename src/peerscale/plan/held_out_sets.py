"""Which held-out sets a cell is evaluated on, on how many tokens of each, and why other sets are skipped."""

from collections.abc import Mapping
from typing import Any

from peerscale.config.schema import FROM_FILES, TABLE_1_SETS, Config
from peerscale.data.batches import fewest_tokens, whole_batches


def evaluated_tokens(config: Config, set_tokens: Mapping[str, int] | None) -> dict[str, int]:
    """Tokens of each held-out set to evaluate on: what `data.evaluation` asks for, or what the set has if that is less.

    Only whole batches count; sets smaller than one batch are left out.
    """
    tokens, skipped = {}, skipped_sets(config, set_tokens)
    for name, asked in config.data.evaluation.items():
        n_batches = asked // config.tokens_per_step
        if set_tokens is not None:
            n_batches = min(n_batches, _batches(config, name, set_tokens))
        if n_batches and name not in skipped:
            tokens[name] = n_batches * config.tokens_per_step
    return tokens


def skipped_sets(config: Config, set_tokens: Mapping[str, int] | None) -> dict[str, str]:
    """The held-out sets that `data.evaluation` names and the corpus cannot serve, and why."""
    skipped = {}
    for name in (name for name, asked in config.data.evaluation.items() if asked):
        if name in FROM_FILES and not config.data.held_out.get(name) and name not in (set_tokens or {}):
            skipped[name] = "not on the hub, only from files in data.held_out"
        elif set_tokens is not None and not _batches(config, name, set_tokens):
            skipped[name] = f"fewer tokens than {_needed(config, name)}" if name in set_tokens else "not in this corpus"
    return skipped


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
    for name in ("train", config.data.val_set):
        if not _batches(config, name, set_tokens):
            return f"the {name} set of this corpus has {set_tokens[name]:,} tokens, fewer than {_needed(config, name)}"
    return ""


def batch_shape(config: Config, name: str) -> dict[str, Any]:
    """Arguments of `EvaluationBatches` for a set.

    Sets of Table 1 are small, so neighbouring sequences may share a batch. No model was trained on such batches, so
    none has learned to use the next row.
    """
    shape = {"batch_sequences": config.batch_sequences, "context": config.context}
    return {**shape, "apart": name not in TABLE_1_SETS}


def _batches(config: Config, name: str, set_tokens: Mapping[str, int]) -> int:
    return whole_batches(set_tokens.get(name, 0), **batch_shape(config, name))


def _needed(config: Config, name: str) -> str:
    fewest = fewest_tokens(**batch_shape(config, name))
    return f"the {fewest:,} that a batch of {config.batch_sequences} x {config.context} needs"
