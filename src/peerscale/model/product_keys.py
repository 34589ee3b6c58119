"""Product-key retrieval: the exact top k of N keys at the cost of 2 sqrt(N) (PEER, section 2, equations 4 and 5).

Shapes: T tokens, D model width, H heads, S the 2 halves of a key, C half a key's width, N sub-keys a side, K top_k.
"""

import math

import torch
from torch import Tensor, nn


def candidate_pairs(top_k: int) -> tuple[list[int], list[int]]:
    """Ranks (i, j) that a pair of the top k can have among the best sub-keys of its two sides, counted from 0.

    The pairs (i', j') with i' <= i and j' <= j score at least as high, so the top k holds only pairs with
    (i + 1)(j + 1) <= k: some k ln k of the k^2.
    """
    pairs = [(i, j) for i in range(top_k) for j in range(top_k // (i + 1))]
    return [i for i, _ in pairs], [j for _, j in pairs]


class ProductKeyRetrieval(nn.Module):
    """Queries, product keys and their top k; scores in fp32 whatever the precision.

    Args:
        d_model: width of the input.
        n_experts: rows to choose from, a square.
        n_heads: independent query networks.
        top_k: rows a head retrieves.
        d_key: width of a query and a key, even.
        n_key_sets: 1, shared by the heads, or `n_heads`.
        query_norm: BatchNorm over the queries' features.
        query_bias: a bias on the query projection.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        n_heads: int,
        top_k: int,
        d_key: int,
        *,
        n_key_sets: int = 1,
        query_norm: bool = True,
        query_bias: bool = True,
    ) -> None:
        super().__init__()
        n_keys = math.isqrt(n_experts)
        if n_keys**2 != n_experts:
            raise ValueError(f"n_experts {n_experts} is not a square; nearest: {n_keys**2}, {(n_keys + 1) ** 2}")
        if not 1 <= top_k <= n_keys:
            raise ValueError(f"top_k {top_k} is not in 1..{n_keys}, the sub-keys of a side")
        if d_key % 2:
            raise ValueError(f"d_key {d_key} is odd, but a key has two equal halves")
        if n_key_sets not in (1, n_heads):
            raise ValueError(f"n_key_sets {n_key_sets} is neither 1 nor n_heads {n_heads}")
        self.n_experts, self.n_heads, self.top_k, self.n_keys = n_experts, n_heads, top_k, n_keys
        self.query = nn.Linear(d_model, n_heads * d_key, bias=query_bias)
        self.query_norm = nn.BatchNorm1d(n_heads * d_key) if query_norm else None
        self.sub_keys = nn.Parameter(torch.empty(n_key_sets, 2, n_keys, d_key // 2))
        first, second = candidate_pairs(top_k)
        self.register_buffer("first_rank", torch.tensor(first), persistent=False)
        self.register_buffer("second_rank", torch.tensor(second), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Not stated in the paper: as in the product-key memory code that it points to."""
        nn.init.xavier_uniform_(self.query.weight)
        if self.query.bias is not None:
            nn.init.zeros_(self.query.bias)
        bound = self.sub_keys.shape[-1] ** -0.5
        nn.init.uniform_(self.sub_keys, -bound, bound)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Scores, best first, and row numbers, both (T, H, K)."""
        with torch.autocast(x_TD.device.type, enabled=False):
            query = self.query(x_TD.to(self.query.weight.dtype))
            if self.query_norm is not None:
                query = self.query_norm(query)
            return self.top_rows(self.sub_key_scores(query))

    def sub_key_scores(self, query: Tensor) -> Tensor:
        """Scores of both halves of the queries (T, H x d_key) with their sub-keys: (S, T, H, N)."""
        T = query.shape[0]
        query_STHC = query.view(T, self.n_heads, 2, -1).permute(2, 0, 1, 3)
        if self.sub_keys.shape[0] == 1:
            scores = query_STHC.reshape(2, T * self.n_heads, -1) @ self.sub_keys[0].transpose(-1, -2)
            return scores.view(2, T, self.n_heads, self.n_keys)
        return torch.einsum("sthc,hsnc->sthn", query_STHC, self.sub_keys)

    def top_rows(self, scores_STHN: Tensor) -> tuple[Tensor, Tensor]:
        """The top k sums of a score of either side, exactly, and their rows: i sqrt(N_experts) + j."""
        best, sub_key = scores_STHN.topk(self.top_k, dim=-1)
        candidates = best[0][..., self.first_rank] + best[1][..., self.second_rank]
        scores, position = candidates.topk(self.top_k, dim=-1)
        rows = sub_key[0].gather(-1, self.first_rank[position]) * self.n_keys
        return scores, rows + sub_key[1].gather(-1, self.second_rank[position])
