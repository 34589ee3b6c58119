"""Build a model from a configuration."""

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from peerscale.config.schema import Config
from peerscale.errors import UserError
from peerscale.layers.base import FfnConfig, Place, Surroundings
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
    layers = layers_under_study(config.ffn, around, len(config.replaced_blocks))
    blocks: list[dict[Place, nn.Module]] = []
    for block in range(1, config.n_layers + 1):
        placed = {config.ffn.place: next(layers)} if block in config.replaced_blocks else {}
        if "feed_forward" not in placed:
            placed["feed_forward"] = config.dense_layer.build(around)
        blocks.append(placed)
    return Transformer(
        config.d_model, config.n_heads, config.context, config.data.vocab_size, blocks, operators,
        bool(trainer.activation_checkpointing),
    )  # fmt: skip


def layers_under_study(ffn: FfnConfig, around: Surroundings, n_blocks: int) -> Iterator[nn.Module]:
    """The layers of the replaced blocks; raises `UserError` if their parameters are not as many as in the cost."""
    cost, known = ffn.cost(around), set[nn.Parameter]()
    expected = sum(cost.params.values())
    for _ in range(n_blocks):
        layer = ffn.build(around)
        built = sum(p.numel() for p in {*layer.parameters()} - known)
        if built != expected:
            raise UserError(
                f"{type(layer).__name__} has {built:,} parameters at d_model {around.d_model}, but cost of "
                f"{type(ffn).__name__} says {expected:,}: {cost.params}, shared: {cost.shared}"
            )
        yield layer
        if around.first is None:
            around, known = replace(around, first=layer), {*layer.parameters()}
            expected -= sum(cost.shared.values())
