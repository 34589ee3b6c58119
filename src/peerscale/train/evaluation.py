"""Losses on the held-out sets, on the same tokens for every cell.

In `lambada` (Paperno et al. 2016) only the last word of each passage is scored: `loss` is the mean over the tokens of
all last words, in nats per token, given the whole passage before them, and `ppl` is its exponential. It is neither the
perplexity per word that language-model suites report, which sums over the tokens of a word, nor the accuracy, nor the
loss of whole passages, and it depends on the vocabulary. The paper does not say which of these it reports.
"""

import math
from typing import Any

import numpy as np
import torch

from peerscale.config.schema import Config
from peerscale.data.batches import EvaluationBatches, LastWordBatches
from peerscale.data.store import Corpus
from peerscale.layers.usage import CountsUsage, ExpertUsage
from peerscale.plan.held_out_sets import batch_shape, evaluated_tokens
from peerscale.train.module import LanguageModel
from peerscale.train.ranks import gather, n_ranks, share, sum_over_ranks


def evaluate(module: LanguageModel, corpus: Corpus, config: Config, device: torch.device) -> dict[str, Any]:
    """Evaluate on the sets of `config.data.evaluation` that the corpus has; returns fields of the record.

    Router health is counted over the `val_set`.

    Batches have the training shape, whole ones only, since expert choice depends on the batch; ranks share them.
    """
    result: dict[str, Any] = {"evaluation": {}, "sequence_losses": [], "router": {}}
    module.eval().to(device)
    for name, n_tokens in evaluated_tokens(config, corpus.manifest.set_tokens(config.context)).items():
        if name == config.data.val_set:
            attach_usage(module)
        tokens, shape = corpus.tokens(name), batch_shape(config, name)
        if last_words := name == "lambada":
            batches = LastWordBatches(tokens, n_tokens, corpus.begins_word(), **shape)
        else:
            batches = EvaluationBatches(tokens, n_tokens, **shape)
        counted = [batches.counted(i) for i in range(len(batches))]
        losses = np.concatenate([_sequence_losses(module, batches[i], each, device) for i, each in enumerate(counted)])
        n_counted = np.concatenate(counted).sum(axis=1)
        weights = n_counted / n_counted.mean()
        loss = float((weights * losses).mean())
        linear = weights * losses - (weights - 1) * loss  # linearised: its spread is that of a ratio of two sums
        values = {
            "loss": loss,
            "se": float(linear.std(ddof=1) / math.sqrt(len(losses))) if len(losses) > 1 else math.nan,
            "tokens": int(n_counted.sum()),
            "ppl": math.exp(min(loss, 700.0)),
        }
        if not last_words:
            tokens_per_byte = corpus.manifest.splits[name] / corpus.manifest.utf8_bytes[name]
            values["bits_per_byte"] = loss * tokens_per_byte / math.log(2)
        result["evaluation"][name] = values
        if name == config.data.val_set:
            result["sequence_losses"] = [round(float(x), 5) for x in losses]
            result["router"] = detach_usage(module)
    return result


def _sequence_losses(module: LanguageModel, batch: np.ndarray, counted: np.ndarray, device: torch.device) -> np.ndarray:
    """The mean loss of each sequence over its scored targets; counted (B, T)."""
    tokens, counted_BT = (torch.from_numpy(part[share(len(batch))]).to(device) for part in (batch, counted))
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, module.config.precision == "bf16"):
        parts = tokens.chunk(module.config.surroundings.micro_batches)
        losses_BT = torch.cat([module.losses(part)[1] for part in parts])
        losses_B = (losses_BT * counted_BT).sum(dim=1) / counted_BT.sum(dim=1)
        return gather(losses_B).double().cpu().numpy()


def attach_usage(module: LanguageModel) -> None:
    """Start counting router weights in every layer that has experts."""
    for layer in module.model.modules():
        if isinstance(layer, CountsUsage):
            layer.usage = ExpertUsage(layer.n_experts)


def detach_usage(module: LanguageModel) -> dict[str, float]:
    """Stop counting; returns expert_usage and unevenness, averaged over the layers, and the number of counted tokens.

    Nothing if nothing was counted. With several ranks, all of which must call it, the tokens of all ranks are counted.
    """
    usages = []
    for layer in module.model.modules():
        if isinstance(layer, CountsUsage) and layer.usage is not None:
            usages.append(layer.usage)
            layer.usage = None
    if not usages:
        return {}
    for usage in usages:
        usage.weight_sums, usage.tokens = sum_over_ranks(usage.weight_sums), usage.tokens * n_ranks()
    return {
        "expert_usage": sum(u.usage for u in usages) / len(usages),
        "unevenness": sum(u.unevenness for u in usages) / len(usages),
        "usage_tokens": usages[0].tokens,
    }
