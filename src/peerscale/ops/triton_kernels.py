"""The retrieved-row operators as Triton kernels; `triton_operators` calls them.

Shapes: T tokens, D vector width, J retrieved rows per token, P = T J pairs of a token and a row, R runs of pairs that
share a row. All arrays are contiguous. `order` holds the positions t J + j of the pairs sorted by row; run r is
`order[starts[r]]` to `order[starts[r + 1] - 1]`. Sums are computed in the type of the coefficients. No kernel uses
atomic additions: one program computes each sum, in a fixed order.
"""

import triton  # pyrefly: ignore[missing-import]
import triton.language as tl  # pyrefly: ignore[missing-import]

_BY_TOKEN, _BY_ROW = tl.constexpr(False), tl.constexpr(True)


@triton.jit
def row_dot_products(x, table, rows, out, P, J, D, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """out[t, j] = <x[t], table[rows[t, j]]>; one program per block of pairs."""
    pair = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    known = pair < P
    row = tl.load(rows + pair, known, 0)
    token = (pair // J).to(tl.int64)
    products = tl.zeros((BLOCK_P, BLOCK_D), out.dtype.element_ty)
    for start in range(0, D, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        mask = known[:, None] & (column < D)[None, :]
        vector = tl.load(x + token[:, None] * D + column[None, :], mask, 0)
        products += vector.to(products.dtype) * tl.load(table + row[:, None] * D + column[None, :], mask, 0)
    tl.store(out + pair, tl.sum(products, 1), known)


@triton.jit
def weighted_row_sum(table, rows, weights, out, J, D, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """out[t] = sum_j weights[t, j] table[rows[t, j]]; one program per token and block of columns."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin = token * J
    total = _weighted_sum(table, rows, rows, weights, begin, begin + J, column, J, D, _BY_TOKEN, BLOCK_P, BLOCK_D)
    tl.store(out + token * D + column, total, column < D)


@triton.jit
def table_gradient(
    coefficients, vectors, rows, order, starts, out, J, D, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """out[n] = sum of coefficients[t, j] vectors[t] over the pairs (t, j) of row n; other rows do not change."""
    begin, end = tl.load(starts + tl.program_id(0)), tl.load(starts + tl.program_id(0) + 1)
    if begin < end:
        column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        total = _weighted_sum(vectors, rows, order, coefficients, begin, end, column, J, D, _BY_ROW, BLOCK_P, BLOCK_D)
        tl.store(out + tl.load(rows + tl.load(order + begin)) * D + column, total, column < D)


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
