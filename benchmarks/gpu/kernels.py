"""Time of each of our kernels, and the rate at which it moves bytes, as a share of the rate of a copy.

Bytes are those that the operator asks for, whether they come from memory or from a cache: so a share may be above one
where a table or its tokens fit the cache. `row_dot_products` and `weighted_row_sum` are the forward pass of PEER, and
each the other's backward pass; `table_gradient` is the dense gradient.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from gpu.ceilings import copy_rate, share
from gpu.machine import Machine
from gpu.results import Case, Row
from timing import spread
from torch import Tensor

from peerscale.ops.operators import Operators
from peerscale.ops.pairs import Pairs, TableGradient


class Shape(NamedTuple):
    """N rows of D numbers, T tokens that retrieve J rows each, in heads of K."""

    N: int
    T: int
    D: int
    J: int
    K: int
    dtype: str


FULL = [
    Shape(N, T, D, 128, 16, dtype)
    for N in (2**14, 2**16, 2**20)
    for D in (256, 1024)
    for T in (4096, 16384)
    for dtype in ("float32", "bfloat16")
]
TINY = [Shape(64, 16, 24, 8, 4, "float32")]
KERNELS = (
    "row_dot_products", "weighted_row_sum", "sort_pairs", "table_gradient", "product_key_top_k",
)  # fmt: skip


def cases(machine: Machine, folder: Path) -> Iterator[Case]:
    """Every kernel at every shape."""
    for shape in TINY if machine.rehearse else FULL:
        for kernel in KERNELS:
            if shape.dtype == "bfloat16" and kernel in ("sort_pairs", "product_key_top_k"):
                continue  # training gives them none
            name = f"{kernel} N{shape.N} T{shape.T} D{shape.D} J{shape.J} {shape.dtype}"
            yield Case(name, {"kernel": kernel, **shape._asdict()}, partial(rate, machine, folder, shape, kernel))


def rate(machine: Machine, folder: Path, shape: Shape, kernel: str) -> Row:
    """Seconds of one call, bytes per second, and their share of the copy's."""
    operators = machine.operators
    if not hasattr(operators, kernel):
        return {"reason": "the backend has no such operator"}
    torch.manual_seed(0)
    with torch.device(machine.type):
        call, n_bytes = prepared(operators, shape, kernel)
        times = spread(machine.seconds(call))
    bytes_per_s = n_bytes / times["median_s"]
    return {**times, "bytes_per_s": bytes_per_s, "of_copy": share(bytes_per_s, copy_rate(folder))}


@torch.no_grad()
def prepared(operators: Operators, shape: Shape, kernel: str) -> tuple[Callable[[], object], int]:
    """A call of the kernel on random rows, and the bytes that it asks for."""
    N, T, D, J, K, _ = shape
    dtype = getattr(torch, shape.dtype)
    pairs = Pairs(operators, torch.randint(N, (T, J)), N)
    x, weights = torch.randn(T, D, dtype=dtype), torch.randn(T, J)
    each, index, real = x.element_size(), 8, 4
    gathered = T * J * (D * each + index + real)
    if kernel == "product_key_top_k":
        side = round(N**0.5)
        query, keys = torch.randn(T, J // K, 2, D // 2), torch.randn(1, 2, side, D // 2)
        scores = 2 * T * (J // K) * side
        return lambda: _without_gradient(operators, query, keys, K), 2 * scores * real + query.nbytes
    if kernel == "sort_pairs":
        return lambda: operators.sort_pairs(pairs), 2 * T * J * index
    gradient = TableGradient(pairs, weights, x)
    if kernel == "table_gradient":
        _ = pairs.by_row  # the sort is measured by itself
        return lambda: operators.table_gradient(gradient), gathered + N * D * real
    table = torch.randn(N, D, dtype=dtype)
    if kernel == "row_dot_products":
        return lambda: operators.row_dot_products(x, table, pairs), gathered + x.nbytes
    return lambda: operators.weighted_row_sum(table, pairs, weights), gathered + x.nbytes


@torch.no_grad()
def _without_gradient(operators: Operators, query: Tensor, keys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    return operators.product_key_top_k(query, keys, top_k)
