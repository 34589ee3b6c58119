"""The operators in C++ (`operators.cpp`) for float32 and float64 on a CPU; other tensors use torch's.

The results do not depend on the number of threads.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peerscale.ops.compiler import CompilerError, library
from peerscale.ops.operators import Operators, candidate_pairs
from peerscale.ops.pairs import Pairs, SortedPairs, TableGradient, check_rows
from peerscale.ops.row_sparse_adamw import Rates, State

_ACTIVATIONS = {"gelu": 0, "relu": 1}
_MOST_TOP_K = 64  # largest top_k of `product_key_search.h`
_NARROW_KEYS = 32  # largest half-key width at which checking for repeated sub-keys of a query does not pay off
_QUERIES_A_PART = 1024  # queries whose sub-key gradients are summed together, independent of the number of threads
_CACHE_BYTES = 2**22  # a table of this size stays in a core's cache


class CppOperators(Operators):
    """See `Operators`."""

    name = "cpp"

    def obstacle(self, device: str) -> str | None:
        if device != "cpu":
            return "it is for the CPU"
        try:
            library()
        except CompilerError as error:
            return str(error)
        return None

    def can_search(self, query_THSC: Tensor, sub_keys_GSNC: Tensor, top_k: int) -> bool:
        return _takes(query_THSC, sub_keys_GSNC) and top_k <= _MOST_TOP_K

    def search(self, query_THSC: Tensor, sub_keys_GSNC: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
        (T, H, _, C), (G, _, N, _) = query_THSC.shape, sub_keys_GSNC.shape
        ranks = [torch.tensor(ranks) for ranks in candidate_pairs(top_k)]
        scores_THK = query_THSC.new_empty(T, H, top_k)
        rows_THK = torch.empty(T, H, top_k, dtype=torch.long)
        sub_keys_THSK = torch.empty(T, H, 2, top_k, dtype=torch.int32)
        _run(
            "product_key_top_k", query_THSC.dtype, query_THSC, sub_keys_GSNC, T, H, G, N, C, top_k, *ranks,
            len(ranks[0]), scores_THK, rows_THK, sub_keys_THSK,
        )  # fmt: skip
        return scores_THK, rows_THK, sub_keys_THSK

    def search_gradients(
        self, grad_THK: Tensor, query_THSC: Tensor, sub_keys_GSNC: Tensor, sub_keys_THSK: Tensor
    ) -> tuple[Tensor, Tensor]:
        (T, H, S, C), (G, _, N, _), K = query_THSC.shape, sub_keys_GSNC.shape, sub_keys_THSK.shape[-1]
        inputs, grad_query = (grad_THK, sub_keys_THSK, query_THSC, sub_keys_GSNC), torch.empty_like(query_THSC)
        if C <= _NARROW_KEYS:
            parts = query_THSC.new_empty(-(-T * H // _QUERIES_A_PART), G, S, N, C)
            sizes = (T * H, _QUERIES_A_PART, K, C, G * S * N)
            _run("product_key_backward_narrow", query_THSC.dtype, *inputs, grad_query, parts, *sizes)
            return grad_query, parts.sum(0)
        grad_sub_keys = torch.empty_like(sub_keys_GSNC)
        _run("product_key_backward", query_THSC.dtype, *inputs, grad_query, grad_sub_keys, T * H * S, K, C, G * S * N)
        return grad_query, grad_sub_keys

    def cross_entropy_(self, logits_TV: Tensor, targets_T: Tensor, scale: float) -> Tensor:
        if not _takes(logits_TV):
            return super().cross_entropy_(logits_TV, targets_T, scale)
        check_rows(targets_T, logits_TV.shape[1])
        losses_T = logits_TV.new_empty(len(logits_TV))
        _run("cross_entropy", logits_TV.dtype, logits_TV, targets_T.contiguous(), losses_T, *logits_TV.shape, scale)
        return losses_T

    def rms_norm(self, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        if not _takes(x, weight_D):
            return super().rms_norm(x, weight_D, eps)
        return _RmsNorm.apply(x, weight_D, eps)

    def rotary(self, qkv_BT3HC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
        if not _takes(qkv_BT3HC, cos_TC, sin_TC):
            return super().rotary(qkv_BT3HC, cos_TC, sin_TC)
        return _Rotary.apply(qkv_BT3HC, cos_TC, sin_TC)

    def gate(self, scores_TJ: Tensor, gates_TJ: Tensor, activation: str) -> Tensor:
        if not _takes(scores_TJ, gates_TJ):
            return super().gate(scores_TJ, gates_TJ, activation)
        return _Gate.apply(scores_TJ, gates_TJ, _ACTIVATIONS[activation])

    def row_dot_products(self, x_TD: Tensor, table_ND: Tensor, pairs: Pairs) -> Tensor:
        if not _takes(x_TD, table_ND):
            return super().row_dot_products(x_TD, table_ND, pairs)
        T, J, D = *pairs.rows_TJ.shape, x_TD.shape[1]
        out_TJ = x_TD.new_empty(T, J)
        if _quicker_by_row(pairs, x_TD, table_ND):
            _run("row_dot_products_by_row", x_TD.dtype, _as_struct(pairs), x_TD, table_ND, out_TJ, D)
        else:
            _run("row_dot_products", x_TD.dtype, x_TD, table_ND, pairs.rows_TJ, out_TJ, T, J, D)
        return out_TJ

    def weighted_row_sum(self, table_ND: Tensor, pairs: Pairs, weights_TJ: Tensor) -> Tensor:
        if not _takes(table_ND, weights_TJ):
            return super().weighted_row_sum(table_ND, pairs, weights_TJ)
        T, J, D = *pairs.rows_TJ.shape, table_ND.shape[1]
        out_TD = table_ND.new_empty(T, D)
        if _quicker_by_row(pairs, out_TD, table_ND):
            _run("weighted_row_sum_by_row", table_ND.dtype, _as_struct(pairs), table_ND, weights_TJ, out_TD, T, D)
        else:
            _run("weighted_row_sum", table_ND.dtype, table_ND, pairs.rows_TJ, weights_TJ, out_TD, T, J, D)
        return out_TD

    def sort_pairs(self, pairs: Pairs) -> SortedPairs:
        rows_TJ, P = pairs.rows_TJ, pairs.rows_TJ.numel()
        if rows_TJ.device.type != "cpu":
            return super().sort_pairs(pairs)
        if P >= 2**31:  # the C++ code counts pairs in int32
            raise ValueError(f"{P} pairs of tokens and rows in one batch; kernel cpp takes fewer than 2^31")
        order, tokens, starts = (torch.empty(size, dtype=torch.int32) for size in (P, P, P + 1))
        R = library().peerscale_sort_pairs(*_as_c(rows_TJ, *rows_TJ.shape, pairs.n_rows, order, tokens, starts))
        return SortedPairs(order, tokens, starts[: R + 1])

    def table_gradient(self, gradient: TableGradient) -> Tensor:
        coefficients_TJ, vectors_TD = gradient.coefficients_TJ, gradient.vectors_TD
        if not _takes(coefficients_TJ, vectors_TD):
            return super().table_gradient(gradient)
        D = vectors_TD.shape[1]
        out_ND = vectors_TD.new_zeros(gradient.pairs.n_rows, D)
        _run("table_gradient", out_ND.dtype, _as_struct(gradient.pairs), coefficients_TJ, vectors_TD, out_ND, D)
        return out_ND

    def adamw_rows(self, gradient: TableGradient, table_ND: Tensor, state: State, rates: Rates) -> None:
        factors = (gradient.coefficients_TJ, gradient.vectors_TD)
        changed = (table_ND, state["exp_avg"], state["exp_avg_sq"], state["step"])
        if not (_takes(*factors, *changed) and all(tensor.is_contiguous() for tensor in changed)):
            return super().adamw_rows(gradient, table_ND, state, rates)
        numbers = (rates["lr"], *rates["betas"], rates["eps"], rates["weight_decay"])
        pairs, D = _as_struct(gradient.pairs), table_ND.shape[1]
        _run("adamw_rows", table_ND.dtype, pairs, *factors, *changed, D, *map(float, numbers))


class _Gate(torch.autograd.Function):
    """gates sigma(scores)."""

    @staticmethod
    def forward(ctx: Any, scores_TJ: Tensor, gates_TJ: Tensor, activation: int) -> Tensor:
        scores_TJ, gates_TJ = scores_TJ.contiguous(), gates_TJ.contiguous()
        ctx.save_for_backward(scores_TJ, gates_TJ)
        ctx.activation = activation
        hidden_TJ = torch.empty_like(scores_TJ)
        _run("gate", scores_TJ.dtype, activation, scores_TJ, gates_TJ, hidden_TJ, scores_TJ.numel())
        return hidden_TJ

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:  # pyrefly: ignore[bad-override]
        scores_TJ, gates_TJ = ctx.saved_tensors
        grad_scores, grad_gates = torch.empty_like(scores_TJ), torch.empty_like(gates_TJ)
        inputs, outputs = (scores_TJ, gates_TJ, grads[0].contiguous()), (grad_scores, grad_gates)
        _run("gate_backward", scores_TJ.dtype, ctx.activation, *inputs, *outputs, scores_TJ.numel())
        return grad_scores, grad_gates, None


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x, D = x.contiguous(), len(weight_D)
        y, inverse_T = torch.empty_like(x), x.new_empty(x.numel() // D)
        _run("rms_norm", x.dtype, x, weight_D, y, inverse_T, len(inverse_T), D, eps)
        ctx.save_for_backward(x, weight_D, inverse_T)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:  # pyrefly: ignore[bad-override]
        x, weight_D, inverse_T = ctx.saved_tensors
        T, D = len(inverse_T), len(weight_D)
        grad_x, parts = torch.empty_like(x), x.new_empty(-(-T // 256), D)
        _run("rms_norm_backward", x.dtype, grads[0].contiguous(), x, weight_D, inverse_T, grad_x, parts, T, D)
        return grad_x, parts.sum(0), None


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv_BT3HC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TC, sin_TC)
        return _rotate(qkv_BT3HC, cos_TC, sin_TC, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # pyrefly: ignore[bad-override]
        cos_TC, sin_TC = ctx.saved_tensors
        return _rotate(grads[0], cos_TC, sin_TC, -1.0), None, None


def _rotate(qkv_BT3HC: Tensor, cos_TC: Tensor, sin_TC: Tensor, direction: float) -> Tensor:
    qkv_BT3HC, (B, T, _, H, width) = qkv_BT3HC.contiguous(), qkv_BT3HC.shape
    out = torch.empty_like(qkv_BT3HC)
    _run("rotary", out.dtype, qkv_BT3HC, cos_TC, sin_TC, out, B * T, T, H, width, direction)
    return out


class _SortedPairs(ctypes.Structure):
    """`struct SortedPairs` of `operators.cpp`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("rows", "order", "tokens", "starts")),
        ("R", ctypes.c_int64),
    ]


def _as_struct(pairs: Pairs) -> _SortedPairs:
    by_row = pairs.by_row
    tensors = (pairs.rows_TJ, by_row.order_P, by_row.tokens_P, by_row.starts_R)
    return _SortedPairs(*(tensor.data_ptr() for tensor in tensors), len(by_row.starts_R) - 1)


def _run(name: str, dtype: torch.dtype, *arguments: Tensor | float | ctypes.Structure) -> None:
    """Call a function of `operators.cpp` with as many threads as torch uses."""
    _function(name, dtype)(*_as_c(*arguments, torch.get_num_threads()))


@functools.cache
def _function(name: str, dtype: torch.dtype) -> Callable[..., None]:
    library().peerscale_find.restype = ctypes.c_void_p
    address = library().peerscale_find(name.encode(), ctypes.c_int64(dtype == torch.float64))
    return ctypes.CFUNCTYPE(None)(address)


def _as_c(*arguments: Tensor | float | ctypes.Structure) -> list[Any]:
    return [
        ctypes.c_void_p(argument.data_ptr()) if isinstance(argument, Tensor)
        else ctypes.c_int64(argument) if isinstance(argument, int)
        else ctypes.c_double(argument) if isinstance(argument, float)
        else ctypes.byref(argument)
        for argument in arguments
    ]  # fmt: skip


def _takes(*tensors: Tensor) -> bool:
    """Whether `operators.cpp` supports these tensors."""
    dtype = tensors[0].dtype
    known = dtype in (torch.float32, torch.float64)
    return known and all(tensor.device.type == "cpu" and tensor.dtype == dtype for tensor in tensors)


def _quicker_by_row(pairs: Pairs, vectors_TD: Tensor, table_ND: Tensor) -> bool:
    """Whether it is faster to read each row once and the vectors many times than the other way round."""
    reads_per_row = pairs.rows_TJ.numel() / pairs.n_rows
    return reads_per_row >= 2 and table_ND.nbytes > _CACHE_BYTES and table_ND.nbytes > 2 * vectors_TD.nbytes
