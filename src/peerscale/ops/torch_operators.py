"""The operators on torch's embedding bags, which do not store gathered rows and do not need a compiler.

Faster backends replace the parts; this module defines once how the parts make up the operators and their gradients. The
gradient of an embedding bag with respect to its per-sample weights is the dot product of a row with a vector, so the
operator for that gradient computes `row_dot_products`.

For torch.compile the operators are opaque ones of `torch.library`, whose arguments are tensors, numbers and the name of
the backend. Without torch.compile, autograd functions run instead, since they are faster.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from peerscale.ops.adamw import Rates, State, update_rows
from peerscale.ops.operators import (
    ACTIVATIONS,
    NUMBERED,
    Operators,
    Pairs,
    TableGradient,
    collected_gradients,
)
from peerscale.ops.rounded import rounded_copy

_aten = torch.ops.aten
_SUM = 0  # embedding_bag's mode


class TorchOperators(Operators):
    """See `Operators`."""

    name = "torch"

    def single_neuron_experts(
        self, x_TD: Tensor, w_down_ND: Tensor, w_up_ND: Tensor, rows_TJ: Tensor, gates_TJ: Tensor, activation: str
    ) -> Tensor:
        pairs, dtype = self.pairs(rows_TJ, len(w_down_ND)), x_TD.dtype
        down_ND, up_ND = self.rounded(w_down_ND, dtype), self.rounded(w_up_ND, dtype)
        scores_TJ = _row_operator(x_TD.to(down_ND.dtype), w_down_ND, down_ND, pairs, True)
        return _row_operator(self.gate(scores_TJ, gates_TJ, activation), w_up_ND, up_ND, pairs, False).to(dtype)

    def weighted_rows(
        self, table_ND: Tensor, rows_TJ: Tensor, weights_TJ: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        pairs, dtype = self.pairs(rows_TJ, len(table_ND)), dtype or table_ND.dtype
        return _row_operator(weights_TJ, table_ND, self.rounded(table_ND, dtype), pairs, False).to(dtype)

    def rounded(self, table_ND: Tensor, dtype: torch.dtype) -> Tensor:
        """The table rounded to `dtype`, as the operators read it.

        It is stored in the table's type, since embedding bags and the C++ operators compute in the type of their input.
        """
        return rounded_copy(table_ND, dtype, table_ND.dtype)

    def top_k_by_search(self, query_THSC: Tensor, sub_keys_GSNC: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """`product_key_top_k` for backends that define `search` and `search_gradients`."""
        if torch.compiler.is_compiling():
            return _search(query_THSC, sub_keys_GSNC, top_k, self.name)[:2]
        return _ProductKeyTopK.apply(query_THSC, sub_keys_GSNC, top_k, self)

    def search(self, query_THSC: Tensor, sub_keys_GSNC: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Scores and rows of the top k, and the sub-keys of both sides that make them up, (T, H, 2, K) in int32."""
        raise NotImplementedError

    def search_gradients(
        self, grad_THK: Tensor, query_THSC: Tensor, sub_keys_GSNC: Tensor, sub_keys_THSK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradients of queries and sub-keys, from the gradients of the scores and the sub-keys found."""
        raise NotImplementedError

    def pairs(self, rows_TJ: Tensor, n_rows: int) -> Pairs:
        """The pairs of a batch."""
        return Pairs(self, _own_rows(rows_TJ) if torch.compiler.is_compiling() else rows_TJ, n_rows)

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
        # The gradient of a row is also a weighted sum of rows: of the token vectors of its pairs.
        weights = gradient.coefficients_TJ.view(-1)[by_row.order_P]
        begin = by_row.starts_R[:-1]
        begin = begin[begin < len(by_row.order_P)]  # Triton's pairs end with empty runs
        vectors_TD = gradient.vectors_TD.to(weights.dtype)
        gradient_RD = F.embedding_bag(by_row.tokens_P, vectors_TD, begin, mode="sum", per_sample_weights=weights)
        rows_R = gradient.pairs.rows_TJ.view(-1)[by_row.order_P[begin]]
        update_rows(table_ND, state, rows_R, gradient_RD, rates)


class _RowOperator(torch.autograd.Function):
    """`row_dot_products` of a factor (T, D), or `weighted_row_sum` of a factor (T, J): each is the other's adjoint.

    Rows are read from `read_ND`, which may be a rounded copy of the table. The table's gradient is computed for
    autograd, or kept as its factors if gradients are collected.
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
            grad_table = _table_gradient(grad, factor, ctx.pairs, ctx.collected, ctx.products)
        return grad_factor, grad_table, None, None, None, None


def _apply(factor: Tensor, table_ND: Tensor, pairs: Pairs, products: bool) -> Tensor:
    if products:
        return pairs.operators.row_dot_products(factor, table_ND, pairs)
    return pairs.operators.weighted_row_sum(table_ND, pairs, factor)


def _table_gradient(
    grad: Tensor, factor: Tensor, pairs: Pairs, collected: list[TableGradient] | None, products: bool
) -> Tensor | None:
    gradient = TableGradient(pairs, *((grad, factor) if products else (factor, grad)))
    if collected is None:
        return pairs.operators.table_gradient(gradient)
    collected.append(gradient)
    return None


class _ProductKeyTopK(torch.autograd.Function):
    """The top k; the time of its gradients grows with the number of retrieved sub-keys, not of all sub-keys."""

    @staticmethod
    def forward(
        ctx: Any, query_THSC: Tensor, sub_keys_GSNC: Tensor, top_k: int, operators: TorchOperators
    ) -> tuple[Tensor, Tensor]:
        query_THSC, sub_keys_GSNC = query_THSC.contiguous(), sub_keys_GSNC.contiguous()
        scores_THK, rows_THK, sub_keys_THSK = operators.search(query_THSC, sub_keys_GSNC, top_k)
        ctx.save_for_backward(query_THSC, sub_keys_GSNC, sub_keys_THSK)
        ctx.operators = operators
        ctx.mark_non_differentiable(rows_THK)
        return scores_THK, rows_THK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        return *ctx.operators.search_gradients(grads[0].contiguous(), *ctx.saved_tensors), None, None


def _row_operator(factor: Tensor, table_ND: Tensor, read_ND: Tensor, pairs: Pairs, products: bool) -> Tensor:
    if not torch.compiler.is_compiling():
        return _RowOperator.apply(factor, table_ND, read_ND, pairs, collected_gradients(table_ND), products)
    number = getattr(table_ND, "collected_number", 0)
    return _compiled_row_operator(factor, table_ND, read_ND, pairs.rows_TJ, pairs.operators.name, number, products)


def _named(kernel: str) -> TorchOperators:
    from peerscale.ops.backends import BACKENDS  # here, since the backends are built from this module

    operators = BACKENDS[kernel]
    assert isinstance(operators, TorchOperators)
    return operators


def _shared_pairs(rows_TJ: Tensor, n_rows: int, kernel: str) -> Pairs:
    """The pairs of a tensor of rows, made once for all operators that take this tensor."""
    pairs = getattr(rows_TJ, "pairs", None)
    if pairs is None:
        # A copy: torch.compile overwrites tensors that its graph no longer needs, while the pairs may be collected.
        pairs = rows_TJ.pairs = _named(kernel).pairs(rows_TJ.clone(), n_rows)  # type: ignore[attr-defined]
    return pairs


@torch.library.custom_op("peerscale::own_rows", mutates_args=())
def _own_rows(rows_TJ: Tensor) -> Tensor:
    """A copy, which remains the same object from operator to operator; a view would not."""
    return rows_TJ.long().clone(memory_format=torch.contiguous_format)


@_own_rows.register_fake
def _(rows_TJ: Tensor) -> Tensor:
    return rows_TJ.new_empty(rows_TJ.shape, dtype=torch.long)


@torch.library.custom_op("peerscale::row_operator", mutates_args=())
def _compiled_row_operator(
    factor: Tensor, table_ND: Tensor, read_ND: Tensor, rows_TJ: Tensor, kernel: str, number: int, products: bool
) -> Tensor:
    pairs = _shared_pairs(rows_TJ, len(read_ND), kernel)
    return _apply(factor.contiguous(), read_ND.contiguous(), pairs, products)


@_compiled_row_operator.register_fake
def _(
    factor: Tensor, table_ND: Tensor, read_ND: Tensor, rows_TJ: Tensor, kernel: str, number: int, products: bool
) -> Tensor:
    # The backend decides the types; C++ has the same ones as torch.
    operators = _named("torch" if kernel == "cpp" else kernel)
    return _apply(factor, read_ND, Pairs(operators, rows_TJ, len(read_ND)), products)


@torch.library.custom_op("peerscale::row_operator_backward", mutates_args=())
def _row_operator_backward(
    grad: Tensor, factor: Tensor, read_ND: Tensor, rows_TJ: Tensor, kernel: str, number: int, products: bool
) -> tuple[Tensor, Tensor]:
    grad, factor, read_ND = grad.contiguous(), factor.contiguous(), read_ND.contiguous()
    pairs = _shared_pairs(rows_TJ, len(read_ND), kernel)
    grad_factor = _apply(grad, read_ND, pairs, not products)
    if number:
        grad, factor = grad.clone(), factor.clone()
    grad_table = _table_gradient(grad, factor, pairs, NUMBERED[number] if number else None, products)
    return grad_factor, read_ND.new_empty(0) if grad_table is None else grad_table


@_row_operator_backward.register_fake
def _(
    grad: Tensor, factor: Tensor, read_ND: Tensor, rows_TJ: Tensor, kernel: str, number: int, products: bool
) -> tuple[Tensor, Tensor]:
    if number:
        return torch.empty_like(factor), read_ND.new_empty(0)
    summed_in = torch.promote_types(read_ND.dtype, torch.float32)
    return torch.empty_like(factor), read_ND.new_empty(read_ND.shape, dtype=summed_in)


def _keep_row_operator(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    factor, _, read_ND, rows_TJ, *ctx.others = inputs
    ctx.save_for_backward(factor, read_ND, rows_TJ)


def _row_operator_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    collects = ctx.others[1] > 0
    # torch.compile would remove an operator whose result is not used, and then nothing would be collected.
    assert ctx.needs_input_grad[0] or not collects, (
        "a compiled layer with row-sparse tables needs an input with gradient"
    )
    grad_factor, grad_table = _row_operator_backward(grad, *ctx.saved_tensors, *ctx.others)
    return grad_factor, None if collects else grad_table, None, None, None, None, None


_compiled_row_operator.register_autograd(_row_operator_gradients, setup_context=_keep_row_operator)


@torch.library.custom_op("peerscale::product_key_top_k", mutates_args=())
def _search(query_THSC: Tensor, sub_keys_GSNC: Tensor, top_k: int, kernel: str) -> tuple[Tensor, Tensor, Tensor]:
    return _named(kernel).search(query_THSC.contiguous(), sub_keys_GSNC.contiguous(), top_k)


@_search.register_fake
def _(query_THSC: Tensor, sub_keys_GSNC: Tensor, top_k: int, kernel: str) -> tuple[Tensor, Tensor, Tensor]:
    T, H, S, _ = query_THSC.shape
    scores_THK = query_THSC.new_empty(T, H, top_k, dtype=torch.promote_types(query_THSC.dtype, torch.float32))
    rows_THK = query_THSC.new_empty(T, H, top_k, dtype=torch.long)
    return scores_THK, rows_THK, query_THSC.new_empty(T, H, S, top_k, dtype=torch.int32)


@torch.library.custom_op("peerscale::product_key_top_k_backward", mutates_args=())
def _search_gradients(
    grad_THK: Tensor, query_THSC: Tensor, sub_keys_GSNC: Tensor, sub_keys_THSK: Tensor, kernel: str
) -> tuple[Tensor, Tensor]:
    grad_THK, query_THSC, sub_keys_GSNC = grad_THK.contiguous(), query_THSC.contiguous(), sub_keys_GSNC.contiguous()
    return _named(kernel).search_gradients(grad_THK, query_THSC, sub_keys_GSNC, sub_keys_THSK)


@_search_gradients.register_fake
def _(
    grad_THK: Tensor, query_THSC: Tensor, sub_keys_GSNC: Tensor, sub_keys_THSK: Tensor, kernel: str
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query_THSC), torch.empty_like(sub_keys_GSNC)


def _keep_search(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:2], output[2])
    ctx.kernel = inputs[3]


_search.register_autograd(
    lambda ctx, grad_THK, *_: (*_search_gradients(grad_THK, *ctx.saved_tensors, ctx.kernel), None, None),
    setup_context=_keep_search,
)


def _tokens(rows_TJ: Tensor) -> Tensor:
    """The token of each pair."""
    T, J = rows_TJ.shape
    return torch.arange(T, device=rows_TJ.device).repeat_interleave(J)
