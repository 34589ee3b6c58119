"""The gated dense layer of today's language models: SwiGLU (Shazeer 2020)."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from peerscale.layers.base import FfnConfig, LayerCost, Surroundings, layer_config


def gated_width(d_ff: float) -> int:
    """The hidden width whose three products cost as much as two of width `d_ff`: 2 d_ff / 3, a multiple of 8."""
    return max(1, round(2 * d_ff / 3 / 8)) * 8


@layer_config
class SwigluConfig(FfnConfig):
    """d_model -> 8 d_model / 3 -> d_model: as many FLOPs and parameters as the dense layer, up to rounding."""

    method: Literal["swiglu"] = "swiglu"

    def d_hidden(self, around: Surroundings) -> int:
        """Two thirds of the dense layer's hidden width, as the paper takes it, in multiples of 8."""
        return gated_width(around.d_ff)

    def cost(self, around: Surroundings) -> LayerCost:
        weights = 3 * around.d_model * self.d_hidden(around)
        return LayerCost(params={"ffn": weights}, forward_flops={"ffn": 2 * weights})

    def saved_numbers(self, around: Surroundings) -> int:
        return 2 * around.d_model + 4 * self.d_hidden(around)

    def build(self, around: Surroundings) -> nn.Module:
        return Swiglu(around.d_model, self.d_hidden(around))


class Swiglu(nn.Module):
    """W3 (silu(W1 x) * W2 x), no biases (Shazeer 2020, equation 6). Initial weights: variance 1 / fan-in."""

    def __init__(self, d_model: int, d_hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, d_hidden, bias=False)
        self.up = nn.Linear(d_model, d_hidden, bias=False)
        self.down = nn.Linear(d_hidden, d_model, bias=False)

    def init_weights(self, output_scale: float) -> None:
        """Draw the weights; those of the last product times `output_scale`."""
        for linear in (self.gate, self.up, self.down):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        self.down.weight.data *= output_scale

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> y (..., D)."""
        return self.down(F.silu(self.gate(x)) * self.up(x))
