"""Losses on the held-out sets, on the same tokens for every cell."""

import math
from typing import Any

import lightning
import numpy as np
import torch

from peerscale.config.schema import Config
from peerscale.data.batches import EvaluationBatches
from peerscale.data.store import Corpus
from peerscale.layers.usage import CountsUsage, ExpertUsage
from peerscale.plan.held_out_sets import evaluated_tokens
from peerscale.train.module import LanguageModel


def evaluate(module: LanguageModel, corpus: Corpus, config: Config, device: torch.device) -> dict[str, Any]:
    """Evaluate on the sets of `config.data.evaluation` that the corpus has; returns fields of the record.

    Router health is counted over the `val_set`.

    Batches have the training shape, whole ones only, since expert choice depends on the batch. One device evaluates,
    also after a training on several.
    """
    result: dict[str, Any] = {"evaluation": {}, "sequence_losses": [], "router": {}}
    module.eval().to(device)
    shape = {"batch_sequences": config.batch_sequences, "context": config.context}
    for name, n_tokens in evaluated_tokens(config, corpus.manifest.splits).items():
        if name == config.data.val_set:
            attach_usage(module)
        batches = EvaluationBatches(corpus.tokens(name), n_tokens, **shape)
        losses = sequence_losses(module, batches)
        loss, tokens_per_byte = float(losses.mean()), corpus.manifest.splits[name] / corpus.manifest.utf8_bytes[name]
        values = {
            "loss": loss,
            "se": float(losses.std(ddof=1) / math.sqrt(len(losses))) if len(losses) > 1 else math.nan,
            "tokens": losses.size * config.context,
            "ppl": math.exp(min(loss, 700.0)),
            "bits_per_byte": loss * tokens_per_byte / math.log(2),
        }
        result["evaluation"][name] = values
        if name == config.data.val_set:
            result["sequence_losses"] = [round(float(x), 5) for x in losses]
            result["router"] = detach_usage(module)
    return result


def sequence_losses(module: LanguageModel, batches: EvaluationBatches) -> np.ndarray:
    """The mean loss of each sequence of all batches, on the module's device."""
    losses, device = [], module.device
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, module.config.precision == "bf16"):
        for i in range(len(batches)):
            parts = torch.from_numpy(batches[i]).to(device).chunk(module.config.surroundings.micro_batches)
            losses_BT = torch.cat([module.losses(part)[1] for part in parts])
            losses.append((losses_BT.sum(dim=1) / losses_BT.shape[1]).double().cpu().numpy())
    return np.concatenate(losses)


def attach_usage(module: LanguageModel) -> None:
    """Start counting router weights in every layer that has experts."""
    for layer in module.model.modules():
        if isinstance(layer, CountsUsage):
            layer.usage = ExpertUsage(layer.n_experts)


def detach_usage(module: LanguageModel, trainer: lightning.Trainer | None = None) -> dict[str, float]:
    """Stop counting; returns expert_usage and unevenness, averaged over the layers, and the number of counted tokens.

    Nothing if nothing was counted. If there is a trainer, the tokens of all its devices are counted, and all its
    processes must call this.
    """
    usages = []
    for layer in module.model.modules():
        if isinstance(layer, CountsUsage) and layer.usage is not None:
            usages.append(layer.usage)
            layer.usage = None
    if not usages:
        return {}
    if trainer is not None:
        for usage in usages:
            usage.weight_sums = trainer.strategy.reduce(usage.weight_sums, reduce_op="sum")
            usage.tokens = usage.tokens * trainer.world_size
    return {
        "expert_usage": sum(u.usage for u in usages) / len(usages),
        "unevenness": sum(u.unevenness for u in usages) / len(usages),
        "usage_tokens": usages[0].tokens,
    }
