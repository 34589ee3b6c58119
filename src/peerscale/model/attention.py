"""Causal self-attention with rotary positions.

Shapes: B batch, T tokens, D model width, H heads, C head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROTARY_BASE = 10_000.0


class Attention(nn.Module):
    """Multi-head causal attention, no biases; rotary positions (Su et al. 2021) by halves."""

    def __init__(self, d_model: int, n_heads: int, context: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        d_head = d_model // n_heads
        frequency = ROTARY_BASE ** (-torch.arange(0, d_head, 2, dtype=torch.float64) / d_head)
        angle_TC = torch.outer(torch.arange(context, dtype=torch.float64), frequency).repeat(1, 2)
        sign_C = torch.ones(d_head, dtype=torch.float64)
        sign_C[: d_head // 2] = -1
        self.register_buffer("cos_TC", angle_TC.cos().float(), persistent=False)
        self.register_buffer("signed_sin_TC", (angle_TC.sin() * sign_C).float(), persistent=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """x (B, T, D) -> y (B, T, D)."""
        B, T, D = x_BTD.shape
        qkv = self.qkv(x_BTD).view(B, T, 3, self.n_heads, D // self.n_heads).permute(2, 0, 3, 1, 4)
        query_key = qkv[:2]
        # Rotating by halves is x cos + roll(x) sin, with the sign of the rolled half kept in the sine.
        rolled = query_key.roll(D // self.n_heads // 2, dims=-1)
        query, key = query_key * self.cos_TC[:T] + rolled * self.signed_sin_TC[:T]
        y_BHTC = F.scaled_dot_product_attention(query.to(qkv.dtype), key.to(qkv.dtype), qkv[2], is_causal=True)
        return self.out(y_BHTC.transpose(1, 2).reshape(B, T, D))
