"""The dense feed-forward layer, a wider one, and controls: a block without any, a layer whose work is thrown away."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from peerscale.layers.base import FfnConfig, LayerCost, Surroundings, layer_config
from peerscale.layers.registry import Layer
from peerscale.types import Rate


@layer_config
class DenseConfig(FfnConfig):
    """d_model -> 4 d_model -> d_model."""

    method: Literal["dense"] = "dense"
    initial_output_scale: Rate = 1.0
    """Multiplies the initial weights of the last matrix product. Smaller values imitate sparse layers, whose output is
    4 to 8 times smaller at the start."""

    def d_hidden(self, around: Surroundings) -> int:
        return around.d_ff

    def cost(self, around: Surroundings) -> LayerCost:
        weights = 2 * around.d_model * self.d_hidden(around)
        return LayerCost(params={"ffn": weights}, forward_flops={"ffn": 2 * weights})

    def saved_numbers(self, around: Surroundings) -> int:
        return 2 * around.d_model + 2 * self.d_hidden(around)

    def build(self, around: Surroundings) -> nn.Module:
        return Dense(around.d_model, self.d_hidden(around), self.initial_output_scale)


class Dense(nn.Module):
    """d_model -> d_ff -> d_model with GELU, no biases."""

    def __init__(self, d_model: int, d_ff: int, initial_output_scale: float = 1.0) -> None:
        super().__init__()
        self.initial_output_scale = initial_output_scale
        self.up = nn.Linear(d_model, d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def init_weights(self, output_scale: float) -> None:
        """Variance 1 / fan-in; the second product times `output_scale` and `initial_output_scale`."""
        for linear in (self.up, self.down):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        self.down.weight.data *= output_scale * self.initial_output_scale

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> y (..., D)."""
        return self.down(F.gelu(self.up(x)))


@layer_config
class WideDenseConfig(DenseConfig):
    """A dense layer with as many parameters as a sparse one, all of them active: the upper bound of Dai et al. (2024,
    section 4)."""

    method: Literal["wide_dense"] = "wide_dense"  # pyrefly: ignore[bad-override]
    params_of: Layer
    """The sparse layer, with its settings."""

    def d_hidden(self, around: Surroundings) -> int:
        """The hidden width whose parameter count is nearest to the sparse layer's: off by less than d_model."""
        return round(sum(self.params_of.cost(around).params.values()) / (2 * around.d_model))


@layer_config
class NoLayerConfig(FfnConfig):
    """No feed-forward layer in the block: the control that shows what a layer is worth at equal compute."""

    method: Literal["no_layer"] = "no_layer"

    def cost(self, around: Surroundings) -> LayerCost:
        return LayerCost(params={}, forward_flops={})

    def saved_numbers(self, around: Surroundings) -> int:
        return around.d_model

    def build(self, around: Surroundings) -> nn.Module:
        return NoLayer()


@layer_config
class WastedConfig(DenseConfig):
    """A dense layer whose output is thrown away: the control that a comparison at equal compute must tell as worse."""

    method: Literal["wasted"] = "wasted"  # pyrefly: ignore[bad-override]

    def build(self, around: Surroundings) -> nn.Module:
        return Wasted(around.d_model, self.d_hidden(around), self.initial_output_scale)


class Wasted(Dense):
    """Computes the dense layer and adds nothing to the residual stream."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> zeros (..., D); its weights and x get gradients of zeros."""
        return super().forward(x) * 0


class NoLayer(nn.Module):
    """Adds nothing to the residual stream."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> zeros (..., D), connected to x so that it gets a gradient of zeros."""
        return x * 0
