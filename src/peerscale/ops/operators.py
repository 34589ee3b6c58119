"""The operators that every backend provides to the models, and how they and their gradients are made of a few parts.

The parts here are torch's own: embedding bags, which store no gathered rows and need no compiler. `CppOperators` and
`TritonOperators` replace parts by faster ones; `ReferenceOperators` has the definition instead.

Shapes: T tokens, D vector width, N rows of a table, J retrieved rows per token (heads x top_k); for product keys H
heads, S the 2 halves of a key, C half a key's width, N sub-keys per side, G key sets (1, shared by the heads, or H), K
top_k. Pairs of tokens and rows: see `pairs`.

If vectors have lower precision than a table, such as bf16 and fp32, rows are rounded to the vectors' precision when
they are read. All products and sums, tensors with a number per pair, and the gradient of the table stay in the table's
precision; the output and the gradient of the vectors are rounded to the precision of the vectors.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from peerscale.ops.pairs import Pairs, SortedPairs, TableGradient, collected_gradients
from peerscale.ops.rounded import rounded_copy
from peerscale.ops.row_sparse_adamw import Rates, State, update_rows

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu}
"""Activations of a single-neuron expert."""

_SUM = 0  # embedding_bag's mode


class Operators:
    """A backend. The first five operators are differentiable in all floating-point arguments."""

    name = "torch"
    """The backend's name in `trainer.kernel`."""

    def obstacle(self, device: str) -> str | None:
        """One line on why the backend cannot run on this type of device on this machine; None if it can."""
        return None

    def single_neuron_experts(
        self, x_TD: Tensor, w_down_ND: Tensor, w_up_ND: Tensor, rows_TJ: Tensor, gates_TJ: Tensor, activation: str
    ) -> Tensor:
        """y[t] = sum_j gates[t, j] sigma(<x[t], w_down[i]>) w_up[i], i = rows[t, j] (PEER, equations 6 and 7)."""
        pairs, dtype = Pairs(self, rows_TJ, len(w_down_ND)), x_TD.dtype
        down_ND, up_ND = self.rounded(w_down_ND, dtype), self.rounded(w_up_ND, dtype)
        scores_TJ = _RowProduct.apply(x_TD.to(down_ND.dtype), w_down_ND, down_ND, pairs, False)
        hidden_TJ = self.gate(scores_TJ, gates_TJ, activation)
        return _RowProduct.apply(hidden_TJ, w_up_ND, up_ND, pairs, True).to(dtype)

    def weighted_rows(
        self, table_ND: Tensor, rows_TJ: Tensor, weights_TJ: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        """y[t] = sum_j weights[t, j] table[rows[t, j]]: a product-key memory (Lample et al. 2019).

        `dtype` is the type of y and the precision to which rows are rounded; None: the table's.
        """
        pairs, dtype = Pairs(self, rows_TJ, len(table_ND)), dtype or table_ND.dtype
        return _RowProduct.apply(weights_TJ, table_ND, self.rounded(table_ND, dtype), pairs, True).to(dtype)

    def product_key_top_k(self, query_THSC: Tensor, sub_keys_GSNC: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """For each token and head the K largest sums of a first-side and a second-side score <query half, sub-key>.

        Returns the scores and the rows i N + j of the sub-key pairs (i, j), both (T, H, K), best first, equal ones in a
        fixed order. The search follows PEER, section 2, equations 4 and 5.
        """
        if self.can_search(query_THSC, sub_keys_GSNC, top_k):
            return _ProductKeyTopK.apply(query_THSC, sub_keys_GSNC, top_k, self)
        n_keys = sub_keys_GSNC.shape[2]
        first, second = (torch.tensor(ranks, device=query_THSC.device) for ranks in candidate_pairs(top_k))
        best, sub_key = _sub_key_scores(query_THSC, sub_keys_GSNC).topk(top_k, dim=-1)
        candidates = best[0][..., first] + best[1][..., second]
        scores, position = candidates.topk(top_k, dim=-1)
        rows = sub_key[0].gather(-1, first[position]) * n_keys
        return scores, rows + sub_key[1].gather(-1, second[position])

    def rms_norm(self, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """y = x / sqrt(mean(x^2) + eps) weight, over the last dimension (Zhang and Sennrich 2019)."""
        return F.rms_norm(x, weight_D.shape, weight_D, eps)

    def rotary(self, qkv_BT3HC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
        """Rotate queries and keys by the angles of their positions (Su et al. 2021); values stay as they are.

        B sequences of T tokens; each token has a query, key and value with H heads of width 2 C, whose two halves are
        rotated against each other.
        """
        cos_T11C, sin_T11C = (table[: qkv_BT3HC.shape[1], None, None] for table in (cos_TC, sin_TC))
        first, second = qkv_BT3HC[:, :, :2].chunk(2, dim=-1)
        rotated = (first * cos_T11C - second * sin_T11C, second * cos_T11C + first * sin_T11C)
        return torch.cat([torch.cat(rotated, dim=-1).to(qkv_BT3HC.dtype), qkv_BT3HC[:, :, 2:]], dim=2)

    def cross_entropy_(self, logits_TV: Tensor, targets_T: Tensor, scale: float) -> Tensor:
        """-log softmax(logits[t])[targets[t]]; overwrites the logits with `scale` times its gradient. Not
        differentiable. Half-precision logits are computed with, and have losses, in float32."""
        if logits_TV.dtype in (torch.bfloat16, torch.float16):
            wide_TV = logits_TV.float()
            losses_T = self.cross_entropy_(wide_TV, targets_T, scale)
            logits_TV.copy_(wide_TV)
            return losses_T
        targets_T1 = targets_T.unsqueeze(1)
        log_probabilities_TV = logits_TV.log_softmax(dim=-1)
        torch.exp(log_probabilities_TV, out=logits_TV)
        logits_TV.scatter_add_(1, targets_T1, logits_TV.new_full(targets_T1.shape, -1.0)).mul_(scale)
        return -log_probabilities_TV.gather(1, targets_T1).squeeze(1)

    # The parts of the operators; contiguous tensors, and no autograd but in `gate`.

    def rounded(self, table_ND: Tensor, dtype: torch.dtype) -> Tensor:
        """The table rounded to `dtype`, as the operators read it.

        It is stored in the table's type, since embedding bags and the C++ operators compute in the type of their input.
        """
        return rounded_copy(table_ND, dtype, table_ND.dtype)

    def gate(self, scores_TJ: Tensor, gates_TJ: Tensor, activation: str) -> Tensor:
        """gates sigma(scores), differentiable."""
        return ACTIVATIONS[activation](scores_TJ) * gates_TJ

    def row_dot_products(self, x_TD: Tensor, table_ND: Tensor, pairs: Pairs) -> Tensor:
        """s[t, j] = <x[t], table[rows[t, j]]>: the gradient of an embedding bag's weights."""
        rows_TJ = pairs.rows_TJ
        T, J = rows_TJ.shape
        if T * J == 0:
            return x_TD.new_zeros(T, J)
        offsets = torch.arange(0, T * J, J, device=x_TD.device)
        scores = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            x_TD, table_ND, rows_TJ.view(-1), offsets, _tokens(rows_TJ), _SUM
        )
        return scores.view(T, J)

    def weighted_row_sum(self, table_ND: Tensor, pairs: Pairs, weights_TJ: Tensor) -> Tensor:
        """y[t] = sum_j weights[t, j] table[rows[t, j]]."""
        weights_TJ = weights_TJ.to(table_ND.dtype)
        return F.embedding_bag(pairs.rows_TJ, table_ND, mode="sum", per_sample_weights=weights_TJ)

    def sort_pairs(self, pairs: Pairs) -> SortedPairs:
        """The pairs sorted by row."""
        rows, order = pairs.rows_TJ.view(-1).sort(stable=True)
        _, counts = rows.unique_consecutive(return_counts=True)
        return SortedPairs(order, order // pairs.rows_TJ.shape[1], F.pad(counts.cumsum(0), (1, 0)))

    def table_gradient(self, gradient: TableGradient) -> Tensor:
        """The full gradient (N, D)."""
        rows_TJ, n_rows = gradient.pairs.rows_TJ, gradient.pairs.n_rows
        vectors_TD = gradient.vectors_TD.to(gradient.coefficients_TJ.dtype)
        T, J = rows_TJ.shape
        if T * J == 0:
            return vectors_TD.new_zeros(n_rows, vectors_TD.shape[1])
        sizes = torch.full((T,), J, device=rows_TJ.device)
        return torch.ops.aten._embedding_bag_dense_backward(
            vectors_TD, rows_TJ.view(-1), _tokens(rows_TJ), sizes, sizes.new_empty(0), n_rows, False, _SUM,
            gradient.coefficients_TJ.view(-1), -1,
        )  # fmt: skip

    def adamw_rows(self, gradient: TableGradient, table_ND: Tensor, state: State, rates: Rates) -> None:
        """Apply `row_sparse_adamw.update_rows` to the rows that have pairs."""
        by_row = gradient.pairs.by_row
        # The gradient of a row is also a weighted sum of rows: of the token vectors of its pairs.
        weights = gradient.coefficients_TJ.view(-1)[by_row.order_P]
        begin = by_row.starts_R[:-1]
        begin = begin[begin < len(by_row.order_P)]  # without the empty rows that a backend may append
        vectors_TD = gradient.vectors_TD.to(weights.dtype)
        gradient_RD = F.embedding_bag(by_row.tokens_P, vectors_TD, begin, mode="sum", per_sample_weights=weights)
        rows_R = gradient.pairs.rows_TJ.view(-1)[by_row.order_P[begin]]
        update_rows(table_ND, state, rows_R, gradient_RD, rates)

    def can_search(self, query_THSC: Tensor, sub_keys_GSNC: Tensor, top_k: int) -> bool:
        """Whether `search` and its gradients are there for such tensors."""
        return False

    def search(self, query_THSC: Tensor, sub_keys_GSNC: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Scores and rows of the top k, and the sub-keys of both sides that make them up, (T, H, 2, K) in int32."""
        raise NotImplementedError

    def search_gradients(
        self, grad_THK: Tensor, query_THSC: Tensor, sub_keys_GSNC: Tensor, sub_keys_THSK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradients of queries and sub-keys, from the gradients of the scores and the sub-keys found."""
        raise NotImplementedError


class _RowProduct(torch.autograd.Function):
    """`weighted_row_sum` of weights, or `row_dot_products` of vectors, with the rows of `read_ND`, the rounded table.

    Each is the gradient of the other, and both have the gradient of the table, as factors if it is collected.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, table_ND: Tensor, read_ND: Tensor, pairs: Pairs, sums: bool) -> Tensor:
        values, read_ND = values.contiguous(), read_ND.contiguous()
        ctx.save_for_backward(values, read_ND)
        ctx.pairs, ctx.sums, ctx.collected = pairs, sums, collected_gradients(table_ND)
        return _product(values, read_ND, pairs, sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        (values, read_ND), grad, grad_values, grad_table = ctx.saved_tensors, grads[0].contiguous(), None, None
        if ctx.needs_input_grad[0]:
            grad_values = _product(grad, read_ND, ctx.pairs, not ctx.sums)
        if ctx.needs_input_grad[1]:
            coefficients_TJ, vectors_TD = (values, grad) if ctx.sums else (grad, values)
            gradient = TableGradient(ctx.pairs, coefficients_TJ, vectors_TD)
            if ctx.collected is None:
                grad_table = ctx.pairs.operators.table_gradient(gradient)
            else:
                ctx.collected.append(gradient)
        return grad_values, grad_table, None, None, None


def _product(values: Tensor, read_ND: Tensor, pairs: Pairs, sums: bool) -> Tensor:
    if sums:
        return pairs.operators.weighted_row_sum(read_ND, pairs, values)
    return pairs.operators.row_dot_products(values, read_ND, pairs)


class _ProductKeyTopK(torch.autograd.Function):
    """The top k; the time of its gradients grows with the number of retrieved sub-keys, not of all sub-keys."""

    @staticmethod
    def forward(
        ctx: Any, query_THSC: Tensor, sub_keys_GSNC: Tensor, top_k: int, operators: Operators
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


def candidate_pairs(top_k: int) -> tuple[list[int], list[int]]:
    """Ranks (i, j), counted from 0, that the two sub-keys of a top-k pair can have among the best of their sides.

    The pairs (i', j') with i' <= i and j' <= j score at least as high, so the top k can only have pairs with
    (i + 1)(j + 1) <= k: about k ln k of all k^2 pairs.
    """
    pairs = [(i, j) for i in range(top_k) for j in range(top_k // (i + 1))]
    return [i for i, _ in pairs], [j for _, j in pairs]


def _sub_key_scores(query_THSC: Tensor, sub_keys_GSNC: Tensor) -> Tensor:
    """Scores of both query halves with the sub-keys of their side: (S, T, H, N)."""
    T, H, _, C = query_THSC.shape
    query_STHC = query_THSC.permute(2, 0, 1, 3)
    if len(sub_keys_GSNC) == 1:
        scores = query_STHC.reshape(2, T * H, C) @ sub_keys_GSNC[0].transpose(-1, -2)
        return scores.view(2, T, H, sub_keys_GSNC.shape[2])
    return torch.einsum("sthc,hsnc->sthn", query_STHC, sub_keys_GSNC)


def _tokens(rows_TJ: Tensor) -> Tensor:
    """The token of each pair."""
    T, J = rows_TJ.shape
    return torch.arange(T, device=rows_TJ.device).repeat_interleave(J)
