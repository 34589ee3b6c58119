"""Exact top k of product keys in plain torch (PEER, section 2, equations 4 and 5).

Shapes: T tokens, H heads, S the 2 halves of a key, C half its width, N sub-keys a side, G key sets (1 or H), K top_k.
"""

import torch
from torch import Tensor


def candidate_pairs(top_k: int) -> tuple[list[int], list[int]]:
    """Ranks (i, j) that a pair of the top k can have among the best sub-keys of its two sides, counted from 0.

    The pairs (i', j') with i' <= i and j' <= j score at least as high, so the top k holds only pairs with
    (i + 1)(j + 1) <= k: some k ln k of the k^2.
    """
    pairs = [(i, j) for i in range(top_k) for j in range(top_k // (i + 1))]
    return [i for i, _ in pairs], [j for _, j in pairs]


def sub_key_scores(query_THSC: Tensor, sub_keys_GSNC: Tensor) -> Tensor:
    """Scores of both halves of the queries with their sub-keys: (S, T, H, N)."""
    T, H, _, C = query_THSC.shape
    query_STHC = query_THSC.permute(2, 0, 1, 3)
    if len(sub_keys_GSNC) == 1:
        scores = query_STHC.reshape(2, T * H, C) @ sub_keys_GSNC[0].transpose(-1, -2)
        return scores.view(2, T, H, sub_keys_GSNC.shape[2])
    return torch.einsum("sthc,hsnc->sthn", query_STHC, sub_keys_GSNC)


def product_key_top_k(query_THSC: Tensor, sub_keys_GSNC: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The best K sums of a first-side and a second-side score, best first, and their rows i N + j; both (T, H, K)."""
    n_keys = sub_keys_GSNC.shape[2]
    first, second = (torch.tensor(ranks, device=query_THSC.device) for ranks in candidate_pairs(top_k))
    best, sub_key = sub_key_scores(query_THSC, sub_keys_GSNC).topk(top_k, dim=-1)
    candidates = best[0][..., first] + best[1][..., second]
    scores, position = candidates.topk(top_k, dim=-1)
    rows = sub_key[0].gather(-1, first[position]) * n_keys
    return scores, rows + sub_key[1].gather(-1, second[position])
