"""The operators in Triton (`triton_kernels`) for tensors on a GPU; others, and empty batches, run on `TorchOperators`.

Half-precision vectors and rows are multiplied and summed in float32, in which scores and coefficients of pairs stay.
Memory beyond the tables is O(T (D + J)), nothing waits for the GPU, and row numbers are not checked.
"""

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peerscale.kernels.adamw import Rates, State
from peerscale.kernels.operators import Pairs, SortedPairs, TableGradient
from peerscale.kernels.torch_operators import TorchOperators

_CACHE_BYTES = 2**25  # a table of this size stays in the cache of a large GPU
_ADAMW_BLOCKS = {"BLOCK_P": 8, "BLOCK_D": 256, "num_warps": 4}  # not tuned, since trials would be steps


class TritonOperators(TorchOperators):
    """See `Operators`."""

    name = "triton"

    def obstacle(self, device: str) -> str | None:
        if not _runs_on(device):
            return "it needs a GPU"
        if importlib.util.find_spec("triton") is None:
            return "there is no package triton: pip install 'peerscale[gpu]'"
        return None

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
        # As many runs as there can be, empty ones last: to learn how many there are would be to wait for the GPU.
        runs = torch.arange(min(pairs.n_rows, len(rows_P)) + 1, device=rows_P.device)
        return SortedPairs(order_P, order_P // rows_TJ.shape[1], torch.searchsorted(run_P, runs))

    def table_gradient(self, gradient: TableGradient) -> Tensor:
        if not _takes(gradient.pairs.rows_TJ):
            return super().table_gradient(gradient)
        n_rows = gradient.pairs.n_rows
        out_ND = gradient.vectors_TD.new_zeros(n_rows, gradient.vectors_TD.shape[1])
        tensors, grid, (J, D) = _by_runs(gradient)
        pairs_a_row = (gradient.pairs.rows_TJ.numel() // n_rows).bit_length()
        _launch("table_gradient", grid, *tensors, out_ND, J, D, pairs_a_row)
        return out_ND

    def adamw_rows(self, gradient: TableGradient, table_ND: Tensor, state: State, rates: Rates) -> None:
        changed, lr, (beta1, beta2) = (table_ND, state["exp_avg"], state["exp_avg_sq"]), rates["lr"], rates["betas"]
        if not (_takes(gradient.pairs.rows_TJ) and all(tensor.is_contiguous() for tensor in changed)):
            return super().adamw_rows(gradient, table_ND, state, rates)
        rows_P, runs = gradient.pairs.rows_TJ.view(-1), gradient.pairs.by_row
        # Empty runs name the last row once more, whose count is then written twice.
        rows_R = rows_P[runs.order_P[runs.starts_R[:-1].clamp(max=len(rows_P) - 1)]]
        steps_R = state["step"][rows_R] + 1
        state["step"][rows_R] = steps_R
        # In float64: 1 - beta^steps is small at first.
        size_R = lr / (1 - beta1 ** steps_R.double())
        scale_R = (1 - beta2 ** steps_R.double()).rsqrt()
        keep = size_R.new_full((1,), 1 - lr * rates["weight_decay"])
        factors = (tensor.to(_summed_in(table_ND)) for tensor in (size_R, scale_R, keep))
        tensors, grid, widths = _by_runs(gradient)
        constants = {"beta1": beta1, "beta2": beta2, "eps": rates["eps"], **_ADAMW_BLOCKS}
        _launch("adamw_rows", grid, *tensors, *changed, *factors, *widths, **constants)


def _runs_on(device: str) -> bool:
    """GPUs, and, for tests, a CPU under Triton's interpreter."""
    return device == "cuda" or (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")


def _takes(rows_TJ: Tensor) -> bool:
    return _runs_on(rows_TJ.device.type) and rows_TJ.numel() > 0


def _summed_in(vectors: Tensor) -> torch.dtype:
    return torch.promote_types(vectors.dtype, torch.float32)


def _by_runs(gradient: TableGradient) -> tuple[tuple[Tensor, ...], Callable[..., tuple[int, ...]], tuple[int, int]]:
    """What the kernels that go from run to run begin with: their tensors, grid, and J and D."""
    pairs, runs, vectors_TD = gradient.pairs, gradient.pairs.by_row, gradient.vectors_TD
    J, D = pairs.rows_TJ.shape[1], vectors_TD.shape[1]
    coefficients_TJ = gradient.coefficients_TJ.to(_summed_in(vectors_TD))
    tensors = (coefficients_TJ, vectors_TD, pairs.rows_TJ, runs.order_P, runs.starts_R)
    return tensors, _columns(len(runs.starts_R) - 1, D), (J, D)


def _columns(n: int, D: int) -> Callable[[dict[str, int]], tuple[int, int]]:
    """A grid of n things by blocks of columns."""
    return lambda size: (n, -(-D // size["BLOCK_D"]))


def _launch(kernel: str, grid: Callable[..., tuple[int, ...]], *arguments: Tensor | int, **constants: Any) -> None:
    from peerscale.kernels import triton_kernels  # imports Triton, which need not be there

    # Whether a product and a sum are fused, which shows in the last digit, is not left to Triton's changing default.
    with torch.cuda.device_of(arguments[0]):
        getattr(triton_kernels, kernel)[grid](*arguments, **constants, enable_fp_fusion=True)
