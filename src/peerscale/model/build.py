"""Build a model from a configuration."""

from dataclasses import replace

from torch import nn

from peerscale.config.schema import Config
from peerscale.errors import UserError
from peerscale.layers.base import FfnConfig, Surroundings
from peerscale.layers.dense import DenseConfig
from peerscale.model.transformer import Transformer
from peerscale.ops.backends import choose_operators


def build_model(config: Config, device: str = "cpu") -> Transformer:
    """The transformer with the layer under study in its replaced blocks: tokens (B, T) -> logits (B, T, V).

    Args:
        config: of the cell.
        device: type of the device that the model will run on; it decides the backend of the operators.

    Raises:
        UserError: the layer's parameter count differs from that in its cost, or it has parameters but no method
            `init_weights(output_scale)` that draws them, or it cannot be used in this model.
    """
    trainer = config.trainer
    operators = choose_operators(trainer.kernel, device)
    around = replace(config.surroundings, operators=operators)
    if reason := config.ffn.unusable(around):
        raise UserError(reason)
    ffns = [
        build_ffn(config.ffn, around) if block in config.replaced_blocks else DenseConfig().build(around)
        for block in range(1, config.n_layers + 1)
    ]
    return Transformer(
        config.d_model, config.n_heads, config.context, config.data.vocab_size, ffns, operators,
        trainer.activation_checkpointing,
    )  # fmt: skip


def build_ffn(ffn: FfnConfig, around: Surroundings) -> nn.Module:
    """One layer under study; raises `UserError` if its parameter count differs from that in its cost."""
    layer, priced = ffn.build(around), ffn.cost(around).params
    if (built := sum(p.numel() for p in layer.parameters())) != sum(priced.values()):
        raise UserError(
            f"{type(layer).__name__} has {built:,} parameters at d_model {around.d_model}, but cost of "
            f"{type(ffn).__name__} says {sum(priced.values()):,}: {priced}"
        )
    return layer
