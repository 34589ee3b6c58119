"""The operators in Triton (`triton_kernels`, `triton_top_k`) for tensors on a GPU.

Other tensors, and empty batches, use `TorchOperators`.

Half-precision vectors and rows are multiplied and summed in float32; scores and coefficients of pairs stay in float32.
Memory beyond the tables is O(T (D + J)). No operator waits for the GPU or checks row numbers.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from peerscale.ops.adamw import Rates, State
from peerscale.ops.operators import Pairs, SortedPairs, TableGradient, candidate_pairs
from peerscale.ops.rounded import rounded_copy
from peerscale.ops.torch_operators import TorchOperators

_CACHE_BYTES = 2**25  # a table of this size stays in the cache of a large GPU
_ADAMW_BLOCKS = {"BLOCK_P": 8, "BLOCK_D": 256, "num_warps": 4}  # not tuned, since each trial would update the table
_MOST_TOP_K = 64  # largest top_k of `triton_top_k`, which keeps the best of both sides in registers
_FLOAT32_AT_MOST = (torch.float32, torch.bfloat16, torch.float16)  # types that search and cross-entropy support


class TritonOperators(TorchOperators):
    """See `Operators`."""

    name = "triton"

    def obstacle(self, device: str) -> str | None:
        if not _runs_on(device):
            return "it needs a GPU"
        if importlib.util.find_spec("triton") is None:
            return "there is no package triton: pip install 'peerscale[gpu]'"
        return None

    def product_key_top_k(self, query_THSC: Tensor, sub_keys_GSNC: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """See `Operators`; the scores (T, H, 2, N) are never stored.

        Half-precision numbers are multiplied exactly. Float32 numbers are multiplied in three products of tf32, about
        as exact as float32, or in a single one if torch's float32 matmul precision is not "highest". Sums and returned
        scores are float32. For equal scores the lower sub-key comes first. Float64, top_k above 64 and other devices
        use `TorchOperators`.
        """
        known = query_THSC.dtype == sub_keys_GSNC.dtype and query_THSC.dtype in _FLOAT32_AT_MOST
        if not (known and _takes(query_THSC) and top_k <= min(_MOST_TOP_K, sub_keys_GSNC.shape[2])):
            return super().product_key_top_k(query_THSC, sub_keys_GSNC, top_k)
        return self.top_k_by_search(query_THSC, sub_keys_GSNC, top_k)

    def search(self, query_THSC: Tensor, sub_keys_GSNC: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
        (T, H, _, C), (G, _, N, _), K = query_THSC.shape, sub_keys_GSNC.shape, top_k
        scores_THK = query_THSC.new_empty(T, H, K, dtype=torch.float32)
        rows_THK = query_THSC.new_empty(T, H, K, dtype=torch.long)
        constants = search_constants(query_THSC.dtype, N, C, G, K)
        tokens = T * H // G
        grid = (-(-tokens // constants["BLOCK_M"]), G)
        arrays = (query_THSC, sub_keys_GSNC, scores_THK, rows_THK)
        _launch("product_key_top_k", lambda _: grid, *arrays, tokens, module="triton_top_k", **constants)
        return scores_THK, rows_THK, torch.stack([rows_THK // N, rows_THK % N], dim=2).int()

    def search_gradients(
        self, grad_THK: Tensor, query_THSC: Tensor, sub_keys_GSNC: Tensor, sub_keys_THSK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `TorchOperators`; computed with the operators on rows.

        All sub-keys form one table of G S N rows, and each half of a query is a token that reads K of these rows.
        """
        (T, H, S, C), (G, _, N, _), K = query_THSC.shape, sub_keys_GSNC.shape, sub_keys_THSK.shape[-1]
        side_S1 = torch.arange(S, device=sub_keys_THSK.device)[:, None] * N
        set_H11 = (torch.arange(H, device=sub_keys_THSK.device) % G)[:, None, None] * (S * N)
        pairs = Pairs(self, (sub_keys_THSK + side_S1 + set_H11).view(-1, K), G * S * N)
        weights = grad_THK.unsqueeze(2).expand(T, H, S, K).reshape(-1, K).contiguous()  # a view if T H or K is 1
        grad_query = self.weighted_row_sum(sub_keys_GSNC.view(-1, C), pairs, weights)
        grad_sub_keys = self.table_gradient(TableGradient(pairs, weights, query_THSC.view(-1, C)))
        return grad_query.view_as(query_THSC), grad_sub_keys.view_as(sub_keys_GSNC)

    def cross_entropy_(self, logits_TV: Tensor, targets_T: Tensor, scale: float) -> Tensor:
        # Kernels take Python numbers as float32, which is too imprecise a `scale` for float64.
        if not (_takes(logits_TV) and logits_TV.is_contiguous() and logits_TV.dtype in _FLOAT32_AT_MOST):
            return super().cross_entropy_(logits_TV, targets_T, scale)
        (T, V), losses_T = logits_TV.shape, logits_TV.new_empty(len(logits_TV))
        blocks = {"BLOCK_V": min(4096, _power_of_two(V)), "num_warps": 8}
        _launch("cross_entropy", lambda _: (T,), logits_TV, targets_T.contiguous(), losses_T, V, scale, **blocks)
        return losses_T

    def rounded(self, table_ND: Tensor, dtype: torch.dtype) -> Tensor:
        return rounded_copy(table_ND, dtype, dtype if _runs_on(table_ND.device.type) else table_ND.dtype)

    def row_dot_products(self, x_TD: Tensor, table_ND: Tensor, pairs: Pairs) -> Tensor:
        rows_TJ = pairs.rows_TJ
        if not _takes(rows_TJ):
            return super().row_dot_products(x_TD, table_ND, pairs)
        (T, J), D = rows_TJ.shape, x_TD.shape[1]
        by_row = pairs.quicker_by_row(x_TD, table_ND, _CACHE_BYTES)
        out_TJ = x_TD.new_empty(T, J, dtype=_summed_in(x_TD))
        order = pairs.by_row.order_P if by_row else rows_TJ
        tensors = (x_TD, table_ND, rows_TJ, order, out_TJ)
        _launch("row_dot_products", lambda size: (-(-T * J // size["BLOCK_P"]),), *tensors, T * J, J, D, BY_ROW=by_row)
        return out_TJ

    def weighted_row_sum(self, table_ND: Tensor, pairs: Pairs, weights_TJ: Tensor) -> Tensor:
        if not _takes(pairs.rows_TJ):
            return super().weighted_row_sum(table_ND, pairs, weights_TJ)
        (T, J), D = pairs.rows_TJ.shape, table_ND.shape[1]
        out_TD = table_ND.new_empty(T, D)
        tensors = (table_ND, pairs.rows_TJ, weights_TJ.to(_summed_in(table_ND)), out_TD)
        _launch("weighted_row_sum", _columns(T, D), *tensors, J, D)
        return out_TD

    def sort_pairs(self, pairs: Pairs) -> SortedPairs:
        rows_TJ = pairs.rows_TJ
        if not _takes(rows_TJ):
            return super().sort_pairs(pairs)
        rows_P, order_P = rows_TJ.view(-1).int().sort(stable=True)
        run_P = (rows_P.diff(prepend=rows_P[:1]) != 0).cumsum(0)
        # The largest possible number of runs, empty ones last; to know the actual number, we would wait for the GPU.
        runs = torch.arange(min(pairs.n_rows, len(rows_P)) + 1, device=rows_P.device)
        return SortedPairs(order_P, order_P // rows_TJ.shape[1], torch.searchsorted(run_P, runs))

    def table_gradient(self, gradient: TableGradient) -> Tensor:
        if not _takes(gradient.pairs.rows_TJ):
            return super().table_gradient(gradient)
        n_rows = gradient.pairs.n_rows
        vectors_TD = gradient.vectors_TD
        out_ND = vectors_TD.new_zeros(n_rows, vectors_TD.shape[1], dtype=_summed_in(vectors_TD))
        tensors, grid, (J, D) = _by_runs(gradient)
        pairs_a_row = (gradient.pairs.rows_TJ.numel() // n_rows).bit_length()
        _launch("table_gradient", grid, *tensors, out_ND, J, D, pairs_a_row)
        return out_ND

    def adamw_rows(self, gradient: TableGradient, table_ND: Tensor, state: State, rates: Rates) -> None:
        changed, lr, (beta1, beta2) = (table_ND, state["exp_avg"], state["exp_avg_sq"]), rates["lr"], rates["betas"]
        if not (_takes(gradient.pairs.rows_TJ) and all(tensor.is_contiguous() for tensor in changed)):
            return super().adamw_rows(gradient, table_ND, state, rates)
        rows_P, runs = gradient.pairs.rows_TJ.view(-1), gradient.pairs.by_row
        # Empty runs point to the last row again, whose step count is then written twice.
        rows_R = rows_P[runs.order_P[runs.starts_R[:-1].clamp(max=len(rows_P) - 1)]]
        steps_R = state["step"][rows_R] + 1
        state["step"][rows_R] = steps_R
        # In float64, since 1 - beta^steps is small at first.
        size_R = lr / (1 - beta1 ** steps_R.double())
        scale_R = (1 - beta2 ** steps_R.double()).rsqrt()
        keep = size_R.new_full((1,), 1 - lr * rates["weight_decay"])
        factors = (tensor.to(_summed_in(table_ND)) for tensor in (size_R, scale_R, keep))
        tensors, grid, widths = _by_runs(gradient)
        constants = {"beta1": beta1, "beta2": beta2, "eps": rates["eps"], **_ADAMW_BLOCKS}
        _launch("adamw_rows", grid, *tensors, *changed, *factors, *widths, **constants)


def search_constants(dtype: torch.dtype, N: int, C: int, G: int, K: int) -> dict[str, Any]:
    """The constants with which `triton_top_k` is compiled."""
    block_k, candidates = max(2, _power_of_two(K)), len(candidate_pairs(K)[0])
    half = dtype != torch.float32
    # So many queries per program that the registers hold twice the best sub-keys and the candidates of each query.
    block_m, block_n = (64, 128 if half else 64) if K <= 16 else (32, 64) if K <= 32 else (16, 64)
    precision = "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    if os.environ.get("TRITON_INTERPRET") == "1":
        precision = "ieee"
    return {
        "N": N, "C": C, "K": K, "G": G, "CANDIDATES": candidates, "BLOCK_K": block_k,
        "BLOCK_P": max(block_k, _power_of_two(candidates)), "BLOCK_M": block_m, "BLOCK_N": block_n,
        "BLOCK_C": min(64 if half else 32, max(16, _power_of_two(C))), "PRECISION": precision, "num_warps": 8,
        "num_stages": 2,
    }  # fmt: skip


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def _runs_on(device: str) -> bool:
    """Whether Triton runs on this device: GPUs and, for tests, CPUs under Triton's interpreter."""
    return device == "cuda" or (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")


def _takes(rows_TJ: Tensor) -> bool:
    return _runs_on(rows_TJ.device.type) and rows_TJ.numel() > 0


def _summed_in(vectors: Tensor) -> torch.dtype:
    return torch.promote_types(vectors.dtype, torch.float32)


def _by_runs(gradient: TableGradient) -> tuple[tuple[Tensor, ...], Callable[..., tuple[int, ...]], tuple[int, int]]:
    """First arguments of the kernels with one program per run: their tensors, grid, and (J, D)."""
    pairs, runs, vectors_TD = gradient.pairs, gradient.pairs.by_row, gradient.vectors_TD
    J, D = pairs.rows_TJ.shape[1], vectors_TD.shape[1]
    coefficients_TJ = gradient.coefficients_TJ.to(_summed_in(vectors_TD))
    tensors = (coefficients_TJ, vectors_TD, pairs.rows_TJ, runs.order_P, runs.starts_R)
    return tensors, _columns(len(runs.starts_R) - 1, D), (J, D)


def _columns(n: int, D: int) -> Callable[[dict[str, int]], tuple[int, int]]:
    """A grid of n programs by blocks of columns."""
    return lambda size: (n, -(-D // size["BLOCK_D"]))


def _launch(
    kernel: str, grid: Callable[..., tuple[int, ...]], *arguments: Any, module: str = "triton_kernels", **constants: Any
) -> None:
    if isinstance(arguments[0], FakeTensor):
        return
    # Imported here, since Triton may not be installed.
    kernels = importlib.import_module(f"peerscale.ops.{module}")

    # Set explicitly whether a product and a sum are fused, which affects the last digit: Triton's default has changed.
    with torch.cuda.device_of(arguments[0]):
        getattr(kernels, kernel)[grid](*arguments, **constants, enable_fp_fusion=True)
