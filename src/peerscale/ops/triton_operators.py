"""The operators in Triton (`triton_kernels`, `triton_top_k`) for tensors on a GPU.

Other tensors, and empty batches, use torch's operators, and so does row-sparse AdamW: on a GPU a batch reads every row
so often that updating the others too, with `table_gradient` and torch's fused AdamW, costs little.

Half-precision vectors and rows are multiplied and summed in float32; scores and coefficients of pairs stay in float32.
Memory beyond the tables is O(T (D + J)). No operator waits for the GPU or checks row numbers.
"""

import importlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from peerscale.ops.operators import Operators, candidate_pairs
from peerscale.ops.pairs import Pairs, SortedPairs, TableGradient
from peerscale.ops.rounded import rounded_copy

_MOST_TOP_K = 64  # largest top_k of `triton_top_k`, which keeps the best of both sides in registers
_FLOAT32_AT_MOST = (torch.float32, torch.bfloat16, torch.float16)  # types that search and cross-entropy support


class TritonOperators(Operators):
    """See `Operators`."""

    name = "triton"

    def obstacle(self, device: str) -> str | None:
        if not _runs_on(device):
            return "it needs a GPU"
        if importlib.util.find_spec("triton") is None:
            return "there is no package triton: pip install 'peerscale[gpu]'"
        return None

    def can_search(self, query_THSC: Tensor, sub_keys_GSNC: Tensor, top_k: int) -> bool:
        known = query_THSC.dtype == sub_keys_GSNC.dtype and query_THSC.dtype in _FLOAT32_AT_MOST
        return known and _takes(query_THSC) and top_k <= min(_MOST_TOP_K, sub_keys_GSNC.shape[2])

    def search(self, query_THSC: Tensor, sub_keys_GSNC: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
        """See `Operators`; the scores (T, H, 2, N) are never stored.

        Half-precision numbers are multiplied exactly. Float32 numbers are multiplied in three products of tf32, about
        as exact as float32, or in a single one if torch's float32 matmul precision is not "highest". Sums and returned
        scores are float32. For equal scores the lower sub-key comes first.
        """
        (T, H, _, C), (G, _, N, _), K = query_THSC.shape, sub_keys_GSNC.shape, top_k
        scores_THK = query_THSC.new_empty(T, H, K, dtype=torch.float32)
        rows_THK = query_THSC.new_empty(T, H, K, dtype=torch.long)
        constants = search_constants(query_THSC.dtype, N, C, G, K)
        tokens = T * H // G
        grid = (-(-tokens // constants["BLOCK_M"]), G)
        arrays = (query_THSC, sub_keys_GSNC, scores_THK, rows_THK)
        _launch("product_key_top_k", grid, *arrays, tokens, module="triton_top_k", **constants)
        return scores_THK, rows_THK, torch.stack([rows_THK // N, rows_THK % N], dim=2).int()

    def search_gradients(
        self, grad_THK: Tensor, query_THSC: Tensor, sub_keys_GSNC: Tensor, sub_keys_THSK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Operators`; computed with the operators on rows.

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
        (T, V), losses_T = logits_TV.shape, logits_TV.new_empty(len(logits_TV), dtype=torch.float32)
        arrays = (logits_TV, targets_T.contiguous(), losses_T)
        _launch("cross_entropy", (T,), *arrays, V, scale, **cross_entropy_blocks(V))
        return losses_T

    def rounded(self, table_ND: Tensor, dtype: torch.dtype) -> Tensor:
        return rounded_copy(table_ND, dtype, dtype if _runs_on(table_ND.device.type) else table_ND.dtype)

    def row_dot_products(self, x_TD: Tensor, table_ND: Tensor, pairs: Pairs) -> Tensor:
        rows_TJ = pairs.rows_TJ
        if not _takes(rows_TJ):
            return super().row_dot_products(x_TD, table_ND, pairs)
        (T, J), D = rows_TJ.shape, x_TD.shape[1]
        out_TJ, blocks = x_TD.new_empty(T, J, dtype=_summed_in(x_TD)), blocks_of(D)
        grid = (-(-T * J // blocks["BLOCK_P"]),)
        _launch("row_dot_products", grid, x_TD, table_ND, rows_TJ, out_TJ, T * J, J, D, **blocks)
        return out_TJ

    def weighted_row_sum(self, table_ND: Tensor, pairs: Pairs, weights_TJ: Tensor) -> Tensor:
        if not _takes(pairs.rows_TJ):
            return super().weighted_row_sum(table_ND, pairs, weights_TJ)
        (T, J), D = pairs.rows_TJ.shape, table_ND.shape[1]
        out_TD = table_ND.new_empty(T, D)
        tensors = (table_ND, pairs.rows_TJ, weights_TJ.to(_summed_in(table_ND)), out_TD)
        _launch("weighted_row_sum", _by_columns(T, D), *tensors, J, D, **blocks_of(D))
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
        pairs, runs, vectors_TD = gradient.pairs, gradient.pairs.by_row, gradient.vectors_TD
        J, D, dtype = pairs.rows_TJ.shape[1], vectors_TD.shape[1], _summed_in(vectors_TD)
        out_ND = vectors_TD.new_zeros(pairs.n_rows, D, dtype=dtype)
        tensors = (gradient.coefficients_TJ.to(dtype), vectors_TD, pairs.rows_TJ, runs.order_P, runs.starts_R, out_ND)
        _launch("table_gradient", _by_columns(len(runs.starts_R) - 1, D), *tensors, J, D, **blocks_of(D))
        return out_ND


def blocks_of(D: int) -> dict[str, Any]:
    """Block sizes and warps of the kernels on rows of D numbers.

    They depend on the width alone, since block sizes set the order of sums. Not measured on a GPU yet.
    """
    if D <= 64:
        return {"BLOCK_P": 16, "BLOCK_D": 64, "num_warps": 4}
    if D <= 128:
        return {"BLOCK_P": 16, "BLOCK_D": 128, "num_warps": 4}
    return {"BLOCK_P": 4, "BLOCK_D": 256, "num_warps": 2}


def cross_entropy_blocks(V: int) -> dict[str, Any]:
    """Those of the cross-entropy of V logits a token."""
    return {"BLOCK_V": min(4096, _power_of_two(V)), "num_warps": 8}


def _by_columns(n: int, D: int) -> tuple[int, int]:
    """A grid of n programs by blocks of columns."""
    return n, -(-D // blocks_of(D)["BLOCK_D"])


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


def _launch(
    kernel: str, grid: tuple[int, ...], *arguments: Any, module: str = "triton_kernels", **constants: Any
) -> None:
    # Imported here, since Triton may not be installed.
    kernels = importlib.import_module(f"peerscale.ops.{module}")

    # Set explicitly whether a product and a sum are fused, which affects the last digit: Triton's default has changed.
    with torch.cuda.device_of(arguments[0]):
        getattr(kernels, kernel)[grid](*arguments, **constants, enable_fp_fusion=True)
