"""The dense feed-forward layer, and a layer that adds nothing."""

import torch.nn.functional as F
from torch import Tensor, nn


class Dense(nn.Module):
    """d_model -> d_ff -> d_model with GELU, no biases."""

    def __init__(self, d_model: int, d_ff: int, initial_output_scale: float = 1.0) -> None:
        super().__init__()
        self.initial_output_scale = initial_output_scale
        self.down = nn.Linear(d_model, d_ff, bias=False)
        self.up = nn.Linear(d_ff, d_model, bias=False)

    def init_weights(self, output_scale: float) -> None:
        """Variance 1 / fan-in; the second product times `output_scale` and `initial_output_scale`."""
        for linear in (self.down, self.up):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        self.up.weight.data *= output_scale * self.initial_output_scale

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> y (..., D)."""
        return self.up(F.gelu(self.down(x)))


class NoLayer(nn.Module):
    """Adds nothing to the residual stream."""

    def init_weights(self, output_scale: float) -> None:
        """The layer has no weights."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> zeros (..., D), connected to x so that it gets a gradient of zeros."""
        return x * 0
