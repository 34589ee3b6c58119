"""The backbone: a decoder-only transformer with pre-norm RMSNorm, rotary positions and a tied head.

Shapes: B batch, T tokens, D model width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peerscale.errors import UserError
from peerscale.kernels.operators import Operators
from peerscale.model.attention import Attention


class RmsNorm(nn.RMSNorm):
    """torch's RMSNorm, computed by the operators of a backend."""

    def __init__(self, d_model: int, operators: Operators) -> None:
        super().__init__(d_model)
        self.operators = operators

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> y (..., D)."""
        return self.operators.rms_norm(x, self.weight, torch.finfo(self.weight.dtype).eps)


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, d_model: int, n_heads: int, context: int, ffn: nn.Module, operators: Operators) -> None:
        super().__init__()
        self.attention_norm = RmsNorm(d_model, operators)
        self.attention = Attention(d_model, n_heads, context, operators)
        self.ffn_norm = RmsNorm(d_model, operators)
        self.ffn = ffn

    def init_weights(self, output_scale: float) -> None:
        """Draw the weights of both layers; raises `UserError` if the feed-forward layer cannot."""
        self.attention.init_weights(output_scale)
        init_ffn = getattr(self.ffn, "init_weights", None)
        if init_ffn is not None:
            init_ffn(output_scale)
        elif any(True for _ in self.ffn.parameters()):
            raise UserError(
                f"{type(self.ffn).__name__} has parameters but no method init_weights(self, output_scale), "
                "which draws the weights that training starts from (README.md, Add a layer)"
            )

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD))
        return x_BTD + self.ffn(self.ffn_norm(x_BTD))


class Transformer(nn.Module):
    """Tokens to logits; `ffns` are the feed-forward layers of the blocks in order.

    Raises:
        UserError: a feed-forward layer has parameters and no method `init_weights(output_scale)`.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        context: int,
        vocab_size: int,
        ffns: list[nn.Module],
        operators: Operators,
    ) -> None:
        super().__init__()
        self.operators = operators
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.blocks = nn.ModuleList(Block(d_model, n_heads, context, ffn, operators) for ffn in ffns)
        self.norm = RmsNorm(d_model, operators)
        self.init_weights()

    def init_weights(self) -> None:
        """Variance 1 / fan-in; the last product of each layer smaller by sqrt(2 n_layers) (Radford et al. 2019)."""
        output_scale = (2 * len(self.blocks)) ** -0.5
        nn.init.normal_(self.embedding.weight, std=self.embedding.embedding_dim**-0.5)
        for block in self.blocks:
            assert isinstance(block, Block)
            block.init_weights(output_scale)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Tokens (B, T) -> logits (B, T, V)."""
        return F.linear(self.features(tokens_BT), self.embedding.weight)

    def features(self, tokens_BT: Tensor) -> Tensor:
        """Tokens (B, T) -> what the head reads (B, T, D)."""
        x_BTD = self.embedding(tokens_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.norm(x_BTD)

    def auxiliary_loss(self) -> Tensor | None:
        """Sum of the auxiliary losses that layers left in their last forward pass in training."""
        losses = [loss for m in self.modules() if (loss := getattr(m, "auxiliary_loss", None)) is not None]
        tensors = [loss for loss in losses if isinstance(loss, Tensor)]
        return torch.stack(tensors).sum() if tensors else None
