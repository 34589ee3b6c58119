"""Losses on the held-out sets, the same tokens for every cell."""

import math
from typing import Any

import numpy as np
import torch

from peerscale.config import Config
from peerscale.data.batches import EvaluationBatches
from peerscale.data.store import Corpus
from peerscale.model.ranks import gather, n_ranks, share, sum_over_ranks
from peerscale.model.usage import CountsUsage, ExpertUsage
from peerscale.plan import evaluated_tokens
from peerscale.training.module import LanguageModel


def evaluate(module: LanguageModel, corpus: Corpus, config: Config, device: torch.device) -> dict[str, Any]:
    """Evaluate on the sets that `config.data.evaluation` names, as far as the corpus has them: fields of the record.

    Router health is counted over the `val_set`.

    Batches have the training shape, whole ones only, since expert choice depends on the batch; ranks share them.
    """
    result: dict[str, Any] = {"evaluation": {}, "sequence_losses": [], "router": {}}
    module.eval().to(device)
    for name, n_tokens in evaluated_tokens(config, corpus.manifest.splits).items():
        usages = attach_usage(module) if name == config.data.val_set else []
        batches = EvaluationBatches(
            corpus.tokens(name), n_tokens, batch_sequences=config.batch_sequences, context=config.context
        )
        losses = np.concatenate([_sequence_losses(module, batch, device) for batch in batches])
        loss = float(losses.mean())
        nats_to_bits_per_byte = corpus.manifest.splits[name] / corpus.manifest.utf8_bytes[name] / math.log(2)
        result["evaluation"][name] = {
            "loss": loss,
            "se": float(losses.std(ddof=1) / math.sqrt(len(losses))) if len(losses) > 1 else math.nan,
            "tokens": len(losses) * config.context,
            "bits_per_byte": loss * nats_to_bits_per_byte,
            "ppl": math.exp(min(loss, 700.0)),
        }
        if name == config.data.val_set:
            result["sequence_losses"] = [round(float(x), 5) for x in losses]
            result["router"] = detach_usage(module, usages)
    return result


def _sequence_losses(module: LanguageModel, batch: np.ndarray, device: torch.device) -> np.ndarray:
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, module.config.precision == "bf16"):
        parts = torch.from_numpy(batch[share(len(batch))]).to(device).chunk(module.config.surroundings.micro_batches)
        losses_B = torch.cat([module.losses(part)[1].mean(dim=1) for part in parts])
        return gather(losses_B).double().cpu().numpy()


def attach_usage(module: LanguageModel) -> list[ExpertUsage]:
    """Start counting router weights in every layer that has experts."""
    usages = []
    for layer in module.model.modules():
        if isinstance(layer, CountsUsage):
            layer.usage = ExpertUsage(layer.n_experts)
            usages.append(layer.usage)
    return usages


def detach_usage(module: LanguageModel, usages: list[ExpertUsage]) -> dict[str, float]:
    """Stop counting; expert_usage and unevenness, mean over the layers, and the tokens they were counted over.

    On several ranks, which all call it, over the tokens of all.
    """
    for layer in module.model.modules():
        if isinstance(layer, CountsUsage):
            layer.usage = None
    if not usages:
        return {}
    for usage in usages:
        usage.weight_sums, usage.token_sum = sum_over_ranks(usage.weight_sums), usage.token_sum * n_ranks()
    return {
        "expert_usage": sum(u.usage for u in usages) / len(usages),
        "unevenness": sum(u.unevenness for u in usages) / len(usages),
        "usage_tokens": usages[0].tokens,
    }
