"""Models: new ones from a configuration, trained ones from the folder of a finished cell."""

from dataclasses import replace
from pathlib import Path

from torch import nn

from peerscale.config import Config
from peerscale.errors import UserError
from peerscale.layers.dense import DenseConfig
from peerscale.model.trained import read_trained
from peerscale.model.transformer import Transformer


def build_model(config: Config) -> Transformer:
    """The transformer with the layer under study in its replaced blocks: tokens (B, T) -> logits (B, T, V).

    Raises:
        UserError: the layer has not the parameters that it is priced at, or has some and no method
            `init_weights(output_scale)` that draws them, or cannot be used in this model.
    """
    size = config.size
    if reason := config.ffn.unusable(config.surroundings):
        raise UserError(reason)
    ffns = [
        build_ffn(config) if block in config.replaced_blocks else DenseConfig().build(config.surroundings)
        for block in range(1, size.n_layers + 1)
    ]
    return Transformer(size.d_model, size.n_heads, config.context, config.data.vocab_size, ffns, config.trainer.kernel)


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


def build_ffn(config: Config) -> nn.Module:
    """One layer under study; raises `UserError` if it has not the parameters that it is priced at."""
    ffn, around = config.ffn, config.surroundings
    layer, priced = ffn.build(around), ffn.cost(around).params
    if (built := sum(p.numel() for p in layer.parameters())) != sum(priced.values()):
        raise UserError(
            f"{type(layer).__name__} has {built:,} parameters at d_model {around.d_model}, but cost of "
            f"{type(ffn).__name__} says {sum(priced.values()):,}: {priced}"
        )
    return layer
