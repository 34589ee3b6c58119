"""Product-key search as one Triton kernel, which stores only the scores that it returns; `triton_operators` calls it.

Shapes: M queries, one per token and head, of 2 halves of C numbers; N sub-keys per side; K top_k. A score and its index
are packed into one 64-bit number, so that one sort orders both: higher scores first, lower indices first for equal
scores.
"""

import triton  # pyrefly: ignore[missing-import]
import triton.language as tl  # pyrefly: ignore[missing-import]

_NONE = tl.constexpr(-(2**63))


@triton.jit
def product_key_top_k(
    query, sub_keys, scores, rows, tokens, N: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    G: tl.constexpr, CANDIDATES: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The K largest sums of a first-side and a second-side score, and their rows i N + j.

    `query` is (M, 2, C), `sub_keys` (G, 2, N, C); query m reads key set m % G, and there are `tokens` = M / G of each.
    There are CANDIDATES pairs of ranks, those of `operators.candidate_pairs`. The blocks of ranks and of candidates,
    BLOCK_K and BLOCK_P, are powers of two.
    """
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    known = token < tokens
    m = token.to(tl.int64) * G + tl.program_id(1)
    keys = sub_keys + tl.program_id(1).to(tl.int64) * (2 * N * C)
    a = _best(query, keys, m, known, N, C, BLOCK_K, BLOCK_M, BLOCK_N, BLOCK_C, PRECISION)
    b = _best(query + C, keys + N * C, m, known, N, C, BLOCK_K, BLOCK_M, BLOCK_N, BLOCK_C, PRECISION)
    place = tl.arange(0, BLOCK_P)
    # Rank i has K // (i + 1) candidate pairs, j = 0, 1, ...
    i, start, end = place * 0, place * 0, place * 0
    for n in tl.static_range(1, K):
        end += K // n
        i = tl.where(place >= end, n, i)
        start = tl.where(place >= end, end, start)
    i, j = _each(i, BLOCK_M), _each(tl.minimum(place - start, K - 1), BLOCK_M)
    sums = tl.gather(_score(a), i, 1) + tl.gather(_score(b), j, 1)
    best = tl.topk(tl.where((place < CANDIDATES)[None, :], _packed(sums, place[None, :]), _NONE), BLOCK_K)
    # If there are fewer candidates than BLOCK_K, the last places, beyond K, are empty.
    place = tl.minimum(_index(best), BLOCK_P - 1)
    i = tl.gather(_index(a), tl.gather(i, place, 1), 1)
    j = tl.gather(_index(b), tl.gather(j, place, 1), 1)
    rank = tl.arange(0, BLOCK_K)
    at = m[:, None] * K + rank[None, :]
    stored = known[:, None] & (rank < K)[None, :]
    tl.store(scores + at, _score(best), stored)
    tl.store(rows + at, i.to(tl.int64) * N + j, stored)


@triton.jit
def _best(
    query, keys, m, known, N: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The best BLOCK_K sub-keys of one side for each query, best first; computed one tile of scores at a time."""
    best = tl.full((BLOCK_M, BLOCK_K), _NONE, tl.int64)
    for start in range(0, N, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        score = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for c in range(0, C, BLOCK_C):
            column = c + tl.arange(0, BLOCK_C)
            q = tl.load(query + m[:, None] * (2 * C) + column[None, :], known[:, None] & (column < C)[None, :], 0)
            k = tl.load(keys + key[None, :] * C + column[:, None], (key < N)[None, :] & (column < C)[:, None], 0)
            if PRECISION == "ieee":  # the interpreter treats bfloat16 as integers
                q, k = q.to(tl.float32), k.to(tl.float32)
            score = tl.dot(q, k, score, input_precision=PRECISION)
        tile = tl.topk(tl.where((key < N)[None, :], _packed(score, key[None, :]), _NONE), BLOCK_K)
        best = tl.topk(tl.reshape(tl.join(best, tile), (BLOCK_M, 2 * BLOCK_K)), BLOCK_K)
    return best


@triton.jit
def _each(values, BLOCK_M: tl.constexpr):
    """`values` repeated for every query, since `tl.gather` needs indices of the tile's full shape."""
    return tl.broadcast_to(values[None, :], (BLOCK_M, values.shape[0])).to(tl.int32)


@triton.jit
def _packed(score, index):
    """Score and index as one integer; bits of negative scores are inverted, so that integers compare like scores. NaN
    comes first."""
    bits = score.to(tl.int32, bitcast=True)
    bits = tl.where(score != score, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def _score(packed):
    bits = (packed >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _index(packed):
    return 0x7FFFFFFF - (packed & 0x7FFFFFFF).to(tl.int32)
