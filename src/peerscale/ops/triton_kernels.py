"""The retrieved-row operators as Triton kernels; `triton_operators` calls them.

Shapes: T tokens, D vector width, J retrieved rows per token, P = T J pairs of a token and a row, R runs of pairs that
share a row. All arrays are contiguous. `order` holds the positions t J + j of the pairs sorted by row; run r is
`order[starts[r]]` to `order[starts[r + 1] - 1]`. Sums are computed in the type of the coefficients. No kernel uses
atomic additions: one program computes each sum, in a fixed order.
"""

import torch
import triton  # pyrefly: ignore[missing-import]
import triton.language as tl  # pyrefly: ignore[missing-import]
from triton import Config  # pyrefly: ignore[missing-import]

_CONFIGS = [
    Config({"BLOCK_P": block_p, "BLOCK_D": block_d}, num_warps=warps)
    for block_p, block_d, warps in (
        (16, 64, 4), (16, 128, 4), (16, 256, 8), (32, 64, 4), (32, 128, 8), (64, 64, 8),
        (1, 512, 2), (4, 128, 2), (4, 256, 2), (4, 512, 4),
    )
]  # fmt: skip
_BY_TOKEN, _BY_ROW = tl.constexpr(False), tl.constexpr(True)


def _candidates(configs: list[Config], *_: object, **__: object) -> list[Config]:
    """All configurations, or a single one if results must not depend on timing (block sizes set the order of sums)."""
    return configs[:1] if torch.are_deterministic_algorithms_enabled() else configs


def _tuned(*key: str):
    """Try all configurations for new values of the `key` arguments, and keep the fastest on disk for later processes.

    Triton's interpreter does not tune.
    """
    configs = _CONFIGS[:1] if triton.knobs.runtime.interpret else _CONFIGS
    return triton.autotune(configs, [*key], {"early_config_prune": _candidates}, cache_results=True)


@_tuned("D", "BY_ROW")
@triton.jit
def row_dot_products(
    x, table, rows, order, out, P, J, D, BY_ROW: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """out[t, j] = <x[t], table[rows[t, j]]>, computed in the order of the tokens, or by row.

    By row, programs that run at the same time read the same rows, so that each row is loaded from memory once.
    """
    place = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    known = place < P
    pair = place
    if BY_ROW:
        pair = tl.load(order + place, known, 0)
    row = tl.load(rows + pair, known, 0)
    token = (pair // J).to(tl.int64)
    products = tl.zeros((BLOCK_P, BLOCK_D), out.dtype.element_ty)
    for start in range(0, D, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        mask = known[:, None] & (column < D)[None, :]
        vector = tl.load(x + token[:, None] * D + column[None, :], mask, 0)
        products += vector.to(products.dtype) * tl.load(table + row[:, None] * D + column[None, :], mask, 0)
    tl.store(out + pair, tl.sum(products, 1), known)


@_tuned("D", "J")
@triton.jit
def weighted_row_sum(table, rows, weights, out, J, D, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """out[t] = sum_j weights[t, j] table[rows[t, j]]; one program per token and block of columns."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin = token * J
    total = _weighted_sum(table, rows, rows, weights, begin, begin + J, column, J, D, _BY_TOKEN, BLOCK_P, BLOCK_D)
    tl.store(out + token * D + column, total, column < D)


@_tuned("D", "PAIRS_A_ROW")
@triton.jit
def table_gradient(
    coefficients, vectors, rows, order, starts, out, J, D, PAIRS_A_ROW,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[n] = sum of coefficients[t, j] vectors[t] over the pairs (t, j) of row n; other rows do not change."""
    begin, end = tl.load(starts + tl.program_id(0)), tl.load(starts + tl.program_id(0) + 1)
    if begin < end:
        column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        total = _weighted_sum(vectors, rows, order, coefficients, begin, end, column, J, D, _BY_ROW, BLOCK_P, BLOCK_D)
        tl.store(out + tl.load(rows + tl.load(order + begin)) * D + column, total, column < D)


@triton.jit
def adamw_rows(
    coefficients, vectors, rows, order, starts, table, mean, square, size, scale, keep, J, D,
    beta1: tl.constexpr, beta2: tl.constexpr, eps: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """An AdamW step of the rows that have pairs; a row's gradient stays in registers.

    `size` and `scale` are the bias corrections of each run's row, lr / (1 - beta1^steps) and (1 - beta2^steps)^-1/2;
    `keep` is 1 minus the decay.
    """
    run = tl.program_id(0)
    begin, end = tl.load(starts + run), tl.load(starts + run + 1)
    if begin < end:
        column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        g = _weighted_sum(vectors, rows, order, coefficients, begin, end, column, J, D, _BY_ROW, BLOCK_P, BLOCK_D)
        at = tl.load(rows + tl.load(order + begin)) * D + column
        known = column < D
        m = beta1 * tl.load(mean + at, known, 0).to(g.dtype) + (1 - beta1) * g
        v = beta2 * tl.load(square + at, known, 0).to(g.dtype) + (1 - beta2) * g * g
        step = tl.load(size + run) * m / (tl.sqrt(v) * tl.load(scale + run) + eps)
        tl.store(mean + at, m, known)
        tl.store(square + at, v, known)
        tl.store(table + at, tl.load(keep) * tl.load(table + at, known, 0) - step, known)


@triton.jit
def _weighted_sum(
    vectors, rows, order, weights, begin, end, column, J, D,
    BY_ROW: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The weighted sum, in some columns, of the vectors of the pairs from `begin` to `end`.

    The vectors are the rows of a token's pairs or, with BY_ROW, the token vectors of a row's pairs.
    """
    total = tl.zeros((BLOCK_P, BLOCK_D), weights.dtype.element_ty)
    for start in range(begin, end, BLOCK_P):
        place = start + tl.arange(0, BLOCK_P)
        known = place < end
        if BY_ROW:
            pair = tl.load(order + place, known, 0)
            vector = (pair // J).to(tl.int64)
        else:
            pair = place
            vector = tl.load(rows + pair, known, 0)
        mask = known[:, None] & (column < D)[None, :]
        weight = tl.load(weights + pair, known, 0)
        total += weight[:, None] * tl.load(vectors + vector[:, None] * D + column[None, :], mask, 0).to(total.dtype)
    return tl.sum(total, 0)


@triton.jit
def cross_entropy(logits, targets, losses, V, scale, BLOCK_V: tl.constexpr):
    """losses[t] = -log softmax(logits[t])[targets[t]]; overwrites the logits (T, V) with `scale` times its gradient.

    One program per token. Every lane keeps the maximum and the sum of the logits that it has read (online softmax:
    Milakov and Gimelshein 2018), so that a logit is read once for the sum and once for its gradient. Everything is
    computed in float32.
    """
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * V
    target = tl.load(targets + token)
    correct = tl.load(row + target).to(tl.float32)  # before the row is overwritten
    # Not -inf, since -inf - (-inf) is NaN.
    highest = tl.full((BLOCK_V,), -3e38, tl.float32)
    total = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, V, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        x = tl.load(row + column, column < V, float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, x)
        total = total * tl.exp(highest - higher) + tl.exp(x - higher)
        highest = higher
    top = tl.max(highest, 0)
    log_total = tl.log(tl.sum(total * tl.exp(highest - top), 0))
    tl.store(losses + token, log_total - (correct - top))
    for start in range(0, V, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        x = tl.load(row + column, column < V, 0).to(tl.float32)
        p = tl.exp(x - top - log_total)
        tl.store(row + column, tl.where(column == target, p - 1, p) * scale, column < V)
