"""Causal self-attention with rotary positions.

Shapes: B batch, T tokens, D model width, H heads, C half a head's width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peerscale.kernels.operators import Operators

ROTARY_BASE = 10_000.0


class Attention(nn.Module):
    """Multi-head causal attention, no biases; rotary positions (Su et al. 2021) by halves."""

    def __init__(self, d_model: int, n_heads: int, context: int, operators: Operators) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.operators = operators
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        d_head = d_model // n_heads
        frequency = ROTARY_BASE ** (-torch.arange(0, d_head, 2, dtype=torch.float64) / d_head)
        angle_TC = torch.outer(torch.arange(context, dtype=torch.float64), frequency)
        self.register_buffer("cos_TC", angle_TC.cos().float(), persistent=False)
        self.register_buffer("sin_TC", angle_TC.sin().float(), persistent=False)

    def init_weights(self, output_scale: float) -> None:
        """Variance 1 / fan-in; the output projection times `output_scale`."""
        for linear in (self.qkv, self.out):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        self.out.weight.data *= output_scale

    def forward(self, x_BTD: Tensor) -> Tensor:
        """x (B, T, D) -> y (B, T, D)."""
        B, T, D = x_BTD.shape
        qkv_BT3HC = self.qkv(x_BTD).view(B, T, 3, self.n_heads, D // self.n_heads)
        query, key, value = self.operators.rotary(qkv_BT3HC, self.cos_TC, self.sin_TC).transpose(1, 3).unbind(2)
        y_BHTC = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(y_BHTC.transpose(1, 2).reshape(B, T, D))
