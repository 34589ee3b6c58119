"""The definition of the operators (`Operators`), in plain torch; it materialises every gathered row."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from peerscale.kernels.adamw import AdamW, Moments, update_rows
from peerscale.kernels.operators import Pairs, SortedPairs, TableGradient

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu}
"""Of an expert's one neuron."""


class Reference:
    """See `Operators`."""

    name = "reference"

    def obstacle(self, device: str) -> str | None:
        return None

    def single_neuron_experts(
        self, x_TD: Tensor, w_down_ND: Tensor, w_up_ND: Tensor, rows_TJ: Tensor, gates_TJ: Tensor, activation: str
    ) -> Tensor:
        hidden_TJ = ACTIVATIONS[activation](torch.einsum("td,tjd->tj", x_TD, w_down_ND[rows_TJ]))
        return self.weighted_rows(w_up_ND, rows_TJ, hidden_TJ * gates_TJ)

    def weighted_rows(self, table_ND: Tensor, rows_TJ: Tensor, weights_TJ: Tensor) -> Tensor:
        return torch.einsum("tj,tjd->td", weights_TJ, table_ND[rows_TJ])

    def product_key_top_k(self, query_THSC: Tensor, sub_keys_GSNC: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """As PEER, section 2, equations 4 and 5."""
        n_keys = sub_keys_GSNC.shape[2]
        first, second = (torch.tensor(ranks, device=query_THSC.device) for ranks in candidate_pairs(top_k))
        best, sub_key = _sub_key_scores(query_THSC, sub_keys_GSNC).topk(top_k, dim=-1)
        candidates = best[0][..., first] + best[1][..., second]
        scores, position = candidates.topk(top_k, dim=-1)
        rows = sub_key[0].gather(-1, first[position]) * n_keys
        return scores, rows + sub_key[1].gather(-1, second[position])

    def rms_norm(self, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x, weight_D.shape, weight_D, eps)

    def rotary(self, qkv_BT3HC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
        cos_T11C, sin_T11C = (table[: qkv_BT3HC.shape[1], None, None] for table in (cos_TC, sin_TC))
        first, second = qkv_BT3HC[:, :, :2].chunk(2, dim=-1)
        rotated = (first * cos_T11C - second * sin_T11C, second * cos_T11C + first * sin_T11C)
        return torch.cat([torch.cat(rotated, dim=-1).to(qkv_BT3HC.dtype), qkv_BT3HC[:, :, 2:]], dim=2)

    def cross_entropy_(self, logits_TV: Tensor, targets_T: Tensor, scale: float) -> Tensor:
        targets_T1 = targets_T.unsqueeze(1)
        log_probabilities_TV = logits_TV.log_softmax(dim=-1)
        torch.exp(log_probabilities_TV, out=logits_TV)
        logits_TV.scatter_add_(1, targets_T1, logits_TV.new_full(targets_T1.shape, -1.0)).mul_(scale)
        return -log_probabilities_TV.gather(1, targets_T1).squeeze(1)

    def row_dot_products(self, x_TD: Tensor, table_ND: Tensor, pairs: Pairs) -> Tensor:
        return torch.einsum("td,tjd->tj", x_TD, table_ND[pairs.rows_TJ])

    def weighted_row_sum(self, table_ND: Tensor, pairs: Pairs, weights_TJ: Tensor) -> Tensor:
        return torch.einsum("tj,tjd->td", weights_TJ, table_ND[pairs.rows_TJ])

    def sort_pairs(self, pairs: Pairs) -> SortedPairs:
        rows, order = pairs.rows_TJ.view(-1).sort(stable=True)
        _, counts = rows.unique_consecutive(return_counts=True)
        return SortedPairs(order, order // pairs.rows_TJ.shape[1], F.pad(counts.cumsum(0), (1, 0)))

    def table_gradient(self, gradient: TableGradient) -> Tensor:
        pairs, vectors_TD = gradient.pairs, gradient.vectors_TD
        parts_TJD = torch.einsum("tj,td->tjd", gradient.coefficients_TJ, vectors_TD)
        table_ND = vectors_TD.new_zeros(pairs.n_rows, vectors_TD.shape[1])
        return table_ND.index_add(0, pairs.rows_TJ.view(-1), parts_TJD.flatten(0, 1))

    def adamw_rows(self, gradient: TableGradient, table_ND: Tensor, moments: Moments, adamw: AdamW) -> None:
        rows_R = gradient.pairs.rows_TJ.unique()
        update_rows(table_ND, moments, rows_R, self.table_gradient(gradient)[rows_R], adamw)


def candidate_pairs(top_k: int) -> tuple[list[int], list[int]]:
    """Ranks (i, j) that a pair of the top k can have among the best sub-keys of its two sides, counted from 0.

    The pairs (i', j') with i' <= i and j' <= j score at least as high, so the top k holds only pairs with
    (i + 1)(j + 1) <= k: some k ln k of the k^2.
    """
    pairs = [(i, j) for i in range(top_k) for j in range(top_k // (i + 1))]
    return [i for i, _ in pairs], [j for _, j in pairs]


def _sub_key_scores(query_THSC: Tensor, sub_keys_GSNC: Tensor) -> Tensor:
    """Scores of both halves of the queries with their sub-keys: (S, T, H, N)."""
    T, H, _, C = query_THSC.shape
    query_STHC = query_THSC.permute(2, 0, 1, 3)
    if len(sub_keys_GSNC) == 1:
        scores = query_STHC.reshape(2, T * H, C) @ sub_keys_GSNC[0].transpose(-1, -2)
        return scores.view(2, T, H, sub_keys_GSNC.shape[2])
    return torch.einsum("sthc,hsnc->sthn", query_STHC, sub_keys_GSNC)
