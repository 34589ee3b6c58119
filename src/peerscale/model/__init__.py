"""Models: new ones from a configuration, trained ones from the folder of a finished cell."""

from dataclasses import replace
from pathlib import Path
from typing import assert_never

from torch import nn

from peerscale.accounting import wide_d_ff
from peerscale.config import (
    Config,
    DenseConfig,
    FineGrainedMoeConfig,
    MoeConfig,
    PeerConfig,
    PkmConfig,
    WideDenseConfig,
)
from peerscale.kernels.backends import choose_operators
from peerscale.kernels.operators import Operators
from peerscale.model.dense import Dense
from peerscale.model.fine_grained_moe import FineGrainedMoe
from peerscale.model.moe import ExpertChoiceMoe, TokenChoiceMoe
from peerscale.model.peer import Peer
from peerscale.model.pkm import Pkm
from peerscale.model.trained import read_trained
from peerscale.model.transformer import Transformer


def build_model(config: Config, device: str = "cpu") -> Transformer:
    """The transformer with the layer under study in its replaced blocks: tokens (B, T) -> logits (B, T, V).

    Args:
        config: of the cell.
        device: type of device that the model is for, on which depends which backend computes it.

    Raises:
        UserError: the layer has parameters and no method `init_weights(output_scale)` that draws them.
    """
    size, operators = config.size, choose_operators(config.trainer.kernel, device)
    ffns = [
        build_ffn(config, operators) if block in config.replaced_blocks else Dense(size.d_model, size.d_ff)
        for block in range(1, size.n_layers + 1)
    ]
    return Transformer(size.d_model, size.n_heads, config.context, config.data.vocab_size, ffns, operators)


def load_model(folder: str | Path) -> Transformer:
    """The trained model of a finished cell, on the CPU and in evaluation mode.

    Args:
        folder: the cell's, `runs/<sweep>/<cell>`; it was trained with `trainer.keep_checkpoint=true`.

    Raises:
        UserError: the folder holds no finished cell, or one without a checkpoint, or with a damaged one.
    """
    config, weights = read_trained(Path(folder))
    # The kernel that it was trained with may not be able to run here, and the weights do not depend on it.
    model = build_model(replace(config, trainer=replace(config.trainer, kernel="auto")))
    model.load_state_dict(weights)
    return model.eval()


def build_ffn(config: Config, operators: Operators) -> nn.Module:
    """One feed-forward layer of the kind under study."""
    d_model, d_ff, ffn = config.size.d_model, config.size.d_ff, config.ffn
    match ffn:
        case DenseConfig():
            return Dense(d_model, d_ff)
        case WideDenseConfig():
            return Dense(d_model, wide_d_ff(config, ffn))
        case MoeConfig(routing="expert_choice"):
            return ExpertChoiceMoe(d_model, d_ff, ffn.n_experts, ffn.capacity_factor, config.n_routing_groups)
        case MoeConfig():
            return TokenChoiceMoe(
                d_model,
                d_ff,
                ffn.n_experts,
                ffn.top_k,
                load_balance_weight=ffn.load_balance_weight,
                z_loss_weight=ffn.z_loss_weight,
            )
        case FineGrainedMoeConfig():
            return FineGrainedMoe(
                d_model,
                ffn.d_expert(d_ff),
                ffn.n_experts,
                ffn.top_k,
                n_shared=ffn.n_shared,
                load_balance_weight=ffn.load_balance_weight,
            )
        case PkmConfig():
            return Pkm(
                d_model,
                ffn.n_experts,
                ffn.n_heads,
                ffn.top_k,
                ffn.resolved_d_key(d_model),
                n_key_sets=1 if ffn.shared_keys else ffn.n_heads,
                query_norm=ffn.query_norm,
                query_bias=ffn.query_bias,
                n_groups=config.n_routing_groups,
                operators=operators,
            )
        case PeerConfig():
            return Peer(
                d_model,
                ffn.n_experts,
                ffn.n_heads,
                ffn.top_k,
                ffn.resolved_d_key(d_model),
                n_key_sets=1 if ffn.shared_keys else ffn.n_heads,
                query_norm=ffn.query_norm,
                query_bias=ffn.query_bias,
                n_groups=config.n_routing_groups,
                activation=ffn.activation,
                score=ffn.score,
                operators=operators,
            )
        case _:
            assert_never(ffn)
