"""The backbone: a decoder-only transformer with pre-norm RMSNorm, rotary position embedding and a tied head.

Shapes: B batch, T tokens, D model width, V vocabulary, H heads, C half the width of a head.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peerscale.errors import UserError
from peerscale.layers.base import Place
from peerscale.layers.dense import Dense
from peerscale.layers.swiglu import Swiglu
from peerscale.ops.backends import BACKENDS
from peerscale.ops.operators import Operators

ROTARY_BASE = 10_000.0

DENSE = (Dense, Swiglu)
"""Layers that torch may compile and recompute with the backbone: they are matrix products and nothing else."""


class RmsNorm(nn.RMSNorm):
    """torch's RMSNorm, computed by the operators of a backend."""

    def __init__(self, d_model: int, operators: Operators) -> None:
        super().__init__(d_model)
        self.operators = operators

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> y (..., D)."""
        return self.operators.rms_norm(x, self.weight, torch.finfo(self.weight.dtype).eps)


class Attention(nn.Module):
    """Multi-head causal attention without biases. Rotary position embedding (Su et al. 2021) pairs the two halves of a
    head's dimensions."""

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
        """Variance 1 / fan-in; the output projection is multiplied by `output_scale`."""
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


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)), and further layers where their `Place` says.

    A layer with `takes_tokens` is also given the tokens.

    With `recompute` the backward pass recomputes attention and dense layers. Other layers are not recomputed, since
    they may store statistics and losses in their forward pass, which must run only once.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        context: int,
        layers: Mapping[Place, nn.Module],
        operators: Operators,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.attention_norm = RmsNorm(d_model, operators)
        self.attention = Attention(d_model, n_heads, context, operators)
        self.ffn_norm = RmsNorm(d_model, operators)
        self.ffn = layers["feed_forward"]
        self.beside, self.before = layers.get("beside"), layers.get("before_attention")

    @property
    def layers(self) -> list[nn.Module]:
        """All layers but attention."""
        return [layer for layer in (self.ffn, self.beside, self.before) if layer is not None]

    def init_weights(self, output_scale: float) -> None:
        """Draw the weights of all layers; raises `UserError` if one of them cannot."""
        self.attention.init_weights(output_scale)
        for layer in self.layers:
            init_layer = getattr(layer, "init_weights", None)
            if callable(init_layer):
                init_layer(output_scale)
            elif any(True for _ in layer.parameters()):
                raise UserError(
                    f"{type(layer).__name__} has parameters but no method init_weights(self, output_scale), "
                    "which draws the weights that training starts from (docs/layers.md)"
                )

    def forward(self, x_BTD: Tensor, tokens_BT: Tensor) -> Tensor:
        """x (B, T, D), tokens (B, T) -> y (B, T, D)."""
        if self.before is not None:
            x_BTD = x_BTD + _call(self.before, x_BTD, tokens_BT)
        recompute = self.recompute and torch.is_grad_enabled()
        x_BTD = checkpoint(self._attend, x_BTD, use_reentrant=False) if recompute else self._attend(x_BTD)
        if recompute and self.beside is None and isinstance(self.ffn, DENSE):
            return checkpoint(self._feed_forward, x_BTD, tokens_BT, use_reentrant=False)
        return self._feed_forward(x_BTD, tokens_BT)

    def _attend(self, x_BTD: Tensor) -> Tensor:
        return x_BTD + self.attention(self.attention_norm(x_BTD))

    def _feed_forward(self, x_BTD: Tensor, tokens_BT: Tensor) -> Tensor:
        normed_BTD = self.ffn_norm(x_BTD)
        y_BTD = x_BTD + _call(self.ffn, normed_BTD, tokens_BT)
        return y_BTD if self.beside is None else y_BTD + _call(self.beside, normed_BTD, tokens_BT)


def _call(layer: nn.Module, x_BTD: Tensor, tokens_BT: Tensor) -> Tensor:
    return layer(x_BTD, tokens_BT) if getattr(layer, "takes_tokens", False) else layer(x_BTD)


class Transformer(nn.Module):
    """Tokens to logits; `layers` are those of each block, by their place.

    Raises:
        UserError: a layer has parameters and no method `init_weights(output_scale)`.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        context: int,
        vocab_size: int,
        layers: Sequence[Mapping[Place, nn.Module]],
        operators: Operators,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.context, self.operators = context, operators
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.blocks = nn.ModuleList(Block(d_model, n_heads, context, of, operators, recompute) for of in layers)
        self.norm = RmsNorm(d_model, operators)
        self.init_weights()

    def init_weights(self) -> None:
        """Variance 1 / fan-in; the last product of each layer is divided by sqrt(2 n_layers) (Radford et al. 2019)."""
        output_scale = (2 * len(self.blocks)) ** -0.5
        nn.init.normal_(self.embedding.weight, std=self.embedding.embedding_dim**-0.5)
        for block in self.blocks:
            assert isinstance(block, Block)
            block.init_weights(output_scale)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Tokens (B, T) -> logits (B, T, V)."""
        return F.linear(self.features(tokens_BT), self.embedding.weight)

    def features(self, tokens_BT: Tensor) -> Tensor:
        """Tokens (B, T) -> the input of the output head (B, T, D); raises `ValueError` for T above the context."""
        if tokens_BT.shape[1] > self.context:  # a kernel would read beyond the rotary tables
            raise ValueError(f"{tokens_BT.shape[1]} tokens are more than the context of {self.context}")
        x_BTD = self.embedding(tokens_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD, tokens_BT)
        return self.norm(x_BTD)

    def compile_backbone(self) -> None:
        """Let torch compile attention, norms and dense layers on their first use; they then use torch's own operators.

        Retrieval, routing and layers from outside are left out of the graph, and so is the loss.
        """
        torch.compiler.reset()  # a process that trains several cells would soon reach the limit of compilations
        for module in self.modules():
            if isinstance(module, RmsNorm | Attention):
                module.operators = BACKENDS["torch"]
            elif isinstance(module, Block):
                for layer in module.layers:
                    if not isinstance(layer, DENSE):
                        layer.forward = torch.compiler.disable(layer.forward)
        self.features = torch.compile(self.features)

    def auxiliary_loss(self) -> Tensor | None:
        """Sum of the auxiliary losses of the layers and their parts, from their last forward pass in training.

        A loss that a layer passes on from one of its parts counts once.
        """
        losses = [getattr(m, "auxiliary_loss", None) for m in self.modules()]
        tensors = {id(loss): loss for loss in losses if isinstance(loss, Tensor)}
        return torch.stack([*tensors.values()]).sum() if tensors else None
