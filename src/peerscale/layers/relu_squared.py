"""A dense layer with the square of ReLU: Primer (So et al. 2021, section 4)."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from peerscale.layers.base import Surroundings, layer_config
from peerscale.layers.dense import Dense, DenseConfig


@layer_config
class ReluSquaredConfig(DenseConfig):
    """d_model -> 4 d_model -> d_model."""

    method: Literal["relu_squared"] = "relu_squared"  # pyrefly: ignore[bad-override]

    def build(self, around: Surroundings) -> "ReluSquared":
        return ReluSquared(around.d_model, self.d_hidden(around), self.initial_output_scale)


class ReluSquared(Dense):
    """W2 relu(W1 x)^2, no biases; initial weights as those of the dense layer."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> y (..., D)."""
        return self.down(F.relu(self.up(x)).square())
