"""Build a model from a configuration, or load a trained one from the folder of a finished cell."""

from dataclasses import replace
from pathlib import Path

from torch import nn

from peerscale.config.schema import Config
from peerscale.errors import UserError
from peerscale.layers.base import FfnConfig, Surroundings
from peerscale.layers.dense import DenseConfig
from peerscale.model.trained import read_trained
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
    operators = choose_operators(config.trainer.kernel, device)
    around = replace(config.surroundings, operators=operators)
    if reason := config.ffn.unusable(around):
        raise UserError(reason)
    ffns = [
        build_ffn(config.ffn, around) if block in config.replaced_blocks else DenseConfig().build(around)
        for block in range(1, config.n_layers + 1)
    ]
    recompute = config.trainer.activation_checkpointing
    return Transformer(
        config.d_model, config.n_heads, config.context, config.data.vocab_size, ffns, operators, recompute
    )


def load_model(folder: str | Path) -> Transformer:
    """The trained model of a finished cell, on the CPU and in evaluation mode.

    Args:
        folder: of the cell, `runs/<sweep>/<cell>`, trained with `trainer.keep_checkpoint=true`.

    Raises:
        UserError: the folder holds no finished cell, or one without a checkpoint of its last step, or with a damaged
            one, or one whose layer's module has changed since.
    """
    config, weights = read_trained(Path(folder))
    # The kernel of its training may not run here, and the weights do not depend on it.
    model = build_model(replace(config, trainer=replace(config.trainer, kernel="auto")))
    model.load_state_dict(weights)
    return model.eval()


def build_ffn(ffn: FfnConfig, around: Surroundings) -> nn.Module:
    """One layer under study; raises `UserError` if its parameter count differs from that in its cost."""
    layer, priced = ffn.build(around), ffn.cost(around).params
    if (built := sum(p.numel() for p in layer.parameters())) != sum(priced.values()):
        raise UserError(
            f"{type(layer).__name__} has {built:,} parameters at d_model {around.d_model}, but cost of "
            f"{type(ffn).__name__} says {sum(priced.values()):,}: {priced}"
        )
    return layer
