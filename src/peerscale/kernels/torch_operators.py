"""The operators on torch's own embedding bags: no gathered row is materialised, and no compiler needed.

Faster backends replace the parts; how these make up the operators and their gradients is written here once. The
gradient of an embedding bag with respect to its per-sample weights *is* the dot product of a row with a vector, so that
operator computes `row_dot_products`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from peerscale.kernels.adamw import Rates, State, update_rows
from peerscale.kernels.operators import ACTIVATIONS, Operators, Pairs, TableGradient, collected_gradients
from peerscale.kernels.rounded import rounded_copy

_aten = torch.ops.aten
_SUM = 0  # embedding_bag's mode


class TorchOperators(Operators):
    """See `Operators`."""

    name = "torch"

    @torch.compiler.disable  # it cannot look into the C functions of faster backends
    def single_neuron_experts(
        self, x_TD: Tensor, w_down_ND: Tensor, w_up_ND: Tensor, rows_TJ: Tensor, gates_TJ: Tensor, activation: str
    ) -> Tensor:
        pairs, dtype = self.pairs(rows_TJ, len(w_down_ND)), x_TD.dtype
        down_ND, up_ND = self.rounded(w_down_ND, dtype), self.rounded(w_up_ND, dtype)
        x_TD, collected = x_TD.to(down_ND.dtype), collected_gradients(w_down_ND)
        scores_TJ = _RowOperator.apply(x_TD, w_down_ND, down_ND, pairs, collected, True)
        hidden_TJ = self.gate(scores_TJ, gates_TJ, activation)
        return _RowOperator.apply(hidden_TJ, w_up_ND, up_ND, pairs, collected_gradients(w_up_ND), False).to(dtype)

    @torch.compiler.disable
    def weighted_rows(
        self, table_ND: Tensor, rows_TJ: Tensor, weights_TJ: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        pairs, dtype = self.pairs(rows_TJ, len(table_ND)), dtype or table_ND.dtype
        read_ND, collected = self.rounded(table_ND, dtype), collected_gradients(table_ND)
        return _RowOperator.apply(weights_TJ, table_ND, read_ND, pairs, collected, False).to(dtype)

    def rounded(self, table_ND: Tensor, dtype: torch.dtype) -> Tensor:
        """What is read of the table, rounded to `dtype`.

        Kept in the table's type: embedding bags and the C++ compute in the type of what they are given.
        """
        return rounded_copy(table_ND, dtype, table_ND.dtype)

    def pairs(self, rows_TJ: Tensor, n_rows: int) -> Pairs:
        """The pairs of a batch."""
        return Pairs(self, rows_TJ, n_rows)

    def gate(self, scores_TJ: Tensor, gates_TJ: Tensor, activation: str) -> Tensor:
        """gates sigma(scores), differentiable."""
        return ACTIVATIONS[activation](scores_TJ) * gates_TJ

    def row_dot_products(self, x_TD: Tensor, table_ND: Tensor, pairs: Pairs) -> Tensor:
        rows_TJ = pairs.rows_TJ
        T, J = rows_TJ.shape
        if T * J == 0:
            return x_TD.new_zeros(T, J)
        offsets = torch.arange(0, T * J, J, device=x_TD.device)
        scores = _aten._embedding_bag_per_sample_weights_backward(
            x_TD, table_ND, rows_TJ.view(-1), offsets, _tokens(rows_TJ), _SUM
        )
        return scores.view(T, J)

    def weighted_row_sum(self, table_ND: Tensor, pairs: Pairs, weights_TJ: Tensor) -> Tensor:
        weights_TJ = weights_TJ.to(table_ND.dtype)
        return F.embedding_bag(pairs.rows_TJ, table_ND, mode="sum", per_sample_weights=weights_TJ)

    def table_gradient(self, gradient: TableGradient) -> Tensor:
        rows_TJ, n_rows = gradient.pairs.rows_TJ, gradient.pairs.n_rows
        vectors_TD = gradient.vectors_TD.to(gradient.coefficients_TJ.dtype)
        T, J = rows_TJ.shape
        if T * J == 0:
            return vectors_TD.new_zeros(n_rows, vectors_TD.shape[1])
        sizes = torch.full((T,), J, device=rows_TJ.device)
        return _aten._embedding_bag_dense_backward(
            vectors_TD, rows_TJ.view(-1), _tokens(rows_TJ), sizes, sizes.new_empty(0), n_rows, False, _SUM,
            gradient.coefficients_TJ.view(-1), -1,
        )  # fmt: skip

    def adamw_rows(self, gradient: TableGradient, table_ND: Tensor, state: State, rates: Rates) -> None:
        by_row = gradient.pairs.by_row
        # A row's gradient is itself a weighted sum of rows: of the vectors of its pairs' tokens.
        weights = gradient.coefficients_TJ.view(-1)[by_row.order_P]
        begin = by_row.starts_R[:-1]
        vectors_TD = gradient.vectors_TD.to(weights.dtype)
        gradient_RD = F.embedding_bag(by_row.tokens_P, vectors_TD, begin, mode="sum", per_sample_weights=weights)
        rows_R = gradient.pairs.rows_TJ.view(-1)[by_row.order_P[begin]]
        update_rows(table_ND, state, rows_R, gradient_RD, rates)


class _RowOperator(torch.autograd.Function):
    """`row_dot_products` of a factor (T, D) or `weighted_row_sum` of one (T, J): each is the other's adjoint.

    Rows are read from `read_ND`, which may be a rounded copy of the table. The table's gradient is formed for autograd,
    or, where it is collected, left as its factors.
    """

    @staticmethod
    def forward(
        ctx: Any, factor: Tensor, table_ND: Tensor, read_ND: Tensor, pairs: Pairs,
        collected: list[TableGradient] | None, products: bool,
    ) -> Tensor:  # fmt: skip
        factor, read_ND = factor.contiguous(), read_ND.contiguous()
        ctx.save_for_backward(factor, read_ND)
        ctx.pairs, ctx.collected, ctx.products = pairs, collected, products
        return _apply(factor, read_ND, pairs, products)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        factor, read_ND = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_factor = grad_table = None
        if ctx.needs_input_grad[0]:
            grad_factor = _apply(grad, read_ND, ctx.pairs, not ctx.products)
        if ctx.needs_input_grad[1]:
            gradient = TableGradient(ctx.pairs, *((grad, factor) if ctx.products else (factor, grad)))
            if ctx.collected is None:
                grad_table = ctx.pairs.operators.table_gradient(gradient)
            else:
                ctx.collected.append(gradient)
        return grad_factor, grad_table, None, None, None, None


def _apply(factor: Tensor, table_ND: Tensor, pairs: Pairs, products: bool) -> Tensor:
    if products:
        return pairs.operators.row_dot_products(factor, table_ND, pairs)
    return pairs.operators.weighted_row_sum(table_ND, pairs, factor)


def _tokens(rows_TJ: Tensor) -> Tensor:
    """The token of each pair."""
    T, J = rows_TJ.shape
    return torch.arange(T, device=rows_TJ.device).repeat_interleave(J)
