"""Cross-entropy of a linear head, without storing the logits of a whole batch.

Shapes: T tokens, D model width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peerscale.ops.operators import Operators

_LOGITS_AT_ONCE = {"cpu": 2**18}  # a megabyte in float32, which stays in a core's cache between passes
_LOGITS_AT_ONCE_ELSEWHERE = 2**27


def linear_cross_entropy(
    x_TD: Tensor, head_VD: Tensor, targets_T: Tensor, operators: Operators
) -> tuple[Tensor, Tensor]:
    """-log softmax(head x[t])[targets[t]] in nats: the differentiable mean over the tokens, and the loss of each (T,).

    The gradients are computed together with the loss, one slice of the tokens at a time (as in Hsu et al. 2024, "Liger
    Kernel"). The matrix products follow autocast, and logits stay in its type; losses and softmax are in float32.

    Args:
        operators: the backend that computes losses and softmax.
    """
    device = x_TD.device.type
    if torch.is_autocast_enabled(device):
        x_TD = x_TD.to(torch.get_autocast_dtype(device))
    return _LinearCrossEntropy.apply(x_TD, head_VD, targets_T, operators, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    """The products are in the type of x."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, head_VD: Tensor, targets_T: Tensor, operators: Operators, with_gradients: bool
    ) -> tuple[Tensor, Tensor]:
        (T, V), device, dtype = (len(x_TD), len(head_VD)), x_TD.device.type, x_TD.dtype
        cast_head_VD = head_VD.to(dtype)
        losses_T = head_VD.new_empty(T)
        grad_x, grad_head = torch.empty_like(x_TD), torch.zeros_like(head_VD)
        step = max(1, _LOGITS_AT_ONCE.get(device, _LOGITS_AT_ONCE_ELSEWHERE) // V)
        with torch.autocast(device, enabled=False):
            for start in range(0, T, step):
                part = slice(start, start + step)
                logits = x_TD[part] @ cast_head_VD.T
                losses_T[part] = operators.cross_entropy_(logits, targets_T[part], 1 / T)  # and now its gradient
                if not with_gradients:
                    continue
                torch.mm(logits, cast_head_VD, out=grad_x[part])
                if dtype == head_VD.dtype:
                    grad_head.addmm_(logits.T, x_TD[part])
                else:
                    grad_head += logits.T @ x_TD[part]
        ctx.save_for_backward(grad_x, grad_head)
        ctx.mark_non_differentiable(losses_T)
        return losses_T.mean(), losses_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        grad_x, grad_head = ctx.saved_tensors
        return grad_x * grads[0], grad_head * grads[0], None, None, None
