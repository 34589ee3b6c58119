"""The retrieved-row operators on torch's own embedding bags: no gathered row is materialised, and no compiler needed.

The gradient of an embedding bag with respect to its per-sample weights *is* the dot product of a row with a vector, so
the forward pass of `row_scores` calls that operator, and its backward pass is a bag (for x) and a bag's dense backward
pass (for the table). Same signatures as `reference`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peerscale.kernels.activations import ACTIVATIONS

_aten = torch.ops.aten
_SUM = 0  # embedding_bag's mode


class _RowScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, table_ND: Tensor, indices_TJ: Tensor) -> Tensor:
        T, J = indices_TJ.shape
        token_of_pair = torch.arange(T, device=x_TD.device).repeat_interleave(J)
        offsets = torch.arange(0, T * J, J, device=x_TD.device)
        scores = _aten._embedding_bag_per_sample_weights_backward(
            x_TD, table_ND, indices_TJ.reshape(-1), offsets, token_of_pair, _SUM
        )
        ctx.save_for_backward(x_TD, table_ND, indices_TJ, token_of_pair)
        return scores.view(T, J)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x_TD, table_ND, indices_TJ, token_of_pair = ctx.saved_tensors
        T, J = indices_TJ.shape
        grad_TJ = grads[0].contiguous()
        grad_x = F.embedding_bag(indices_TJ, table_ND, mode="sum", per_sample_weights=grad_TJ)
        sizes = torch.full((T,), J, device=x_TD.device)
        grad_table = _aten._embedding_bag_dense_backward(
            x_TD, indices_TJ.reshape(-1), token_of_pair, sizes, sizes.new_empty(0), table_ND.shape[0], False, _SUM,
            grad_TJ.view(-1), -1,
        )  # fmt: skip
        return grad_x, grad_table, None


def row_scores(x_TD: Tensor, table_ND: Tensor, indices_TJ: Tensor) -> Tensor:
    """s[t, j] = <x[t], table[indices[t, j]]>."""
    if not indices_TJ.numel():
        return (x_TD.sum() + table_ND.sum()) * x_TD.new_zeros(indices_TJ.shape)
    return _RowScores.apply(x_TD.contiguous(), table_ND, indices_TJ)  # type: ignore[no-any-return]


def weighted_rows(table_ND: Tensor, indices_TJ: Tensor, weights_TJ: Tensor) -> Tensor:
    """y[t] = sum_j weights[t, j] table[indices[t, j]]: a product-key memory (Lample et al. 2019)."""
    return F.embedding_bag(indices_TJ, table_ND, mode="sum", per_sample_weights=weights_TJ)


def single_neuron_experts(
    x_TD: Tensor, w_down_ND: Tensor, w_up_ND: Tensor, indices_TJ: Tensor, gates_TJ: Tensor, activation: str
) -> Tensor:
    """y[t] = sum_j gates[t, j] sigma(<x[t], w_down[i]>) w_up[i], i = indices[t, j] (PEER, equations 6 and 7)."""
    hidden_TJ = ACTIVATIONS[activation](row_scores(x_TD, w_down_ND, indices_TJ))
    return weighted_rows(w_up_ND, indices_TJ, hidden_TJ * gates_TJ)
