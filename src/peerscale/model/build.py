"""Build a model from a configuration."""

from collections.abc import Iterator
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
    layers = replacing_layers(config.ffn, around, len(config.replaced_blocks))
    blocks: list[tuple[nn.Module | None, nn.Module]] = []
    for block in range(1, config.n_layers + 1):
        layer = next(layers) if block in config.replaced_blocks else None
        if layer is not None and config.ffn.place == "feed_forward":
            blocks.append((None, layer))
        else:
            blocks.append((layer, DenseConfig().build(around)))
    return Transformer(
        config.d_model, config.n_heads, config.context, config.data.vocab_size, blocks, operators,
        trainer.activation_checkpointing,
    )  # fmt: skip


def replacing_layers(ffn: FfnConfig, around: Surroundings, n_blocks: int) -> Iterator[nn.Module]:
    """The layers under study, in order; raises `UserError` if their parameters are not as many as in the cost."""
    priced, shared = ffn.cost(around).params, ffn.shared_params(around)
    parameters: set[nn.Parameter] = set()
    for block, layer in enumerate(ffn.build_blocks(around, n_blocks)):
        parameters |= {*layer.parameters()}
        built, expected = sum(p.numel() for p in parameters), (block + 1) * sum(priced.values())
        if built != expected - block * sum(shared.values()):
            raise UserError(
                f"{type(layer).__name__} has {built:,} parameters at d_model {around.d_model}, but cost of "
                f"{type(ffn).__name__} says {expected:,}: {priced}"
            )
        yield layer
