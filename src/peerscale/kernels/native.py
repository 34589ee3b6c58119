"""The operators on torch's own embedding bags: no gathered row is materialised, and no compiler needed.

The gradient of an embedding bag with respect to its per-sample weights *is* the dot product of a row with a vector, so
that operator computes `row_scores`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from peerscale.kernels.activations import ACTIVATIONS
from peerscale.kernels.adamw import AdamW, Moments, update_rows
from peerscale.kernels.backbone import Backbone
from peerscale.kernels.gradients import Pairs, Runs, TableGradient, row_bags, row_scores
from peerscale.kernels.product_keys import product_key_top_k

_aten = torch.ops.aten
_SUM = 0  # embedding_bag's mode


class Native(Backbone):
    """See `Operators` and `gradients.Arithmetic`."""

    def single_neuron_experts(
        self, x_TD: Tensor, w_down_ND: Tensor, w_up_ND: Tensor, rows_TJ: Tensor, gates_TJ: Tensor, activation: str
    ) -> Tensor:
        pairs = Pairs(self, rows_TJ, len(w_down_ND))
        scores_TJ = row_scores(x_TD, w_down_ND, pairs)
        hidden_TJ = self.gate(scores_TJ, gates_TJ, activation)
        return row_bags(w_up_ND, pairs, hidden_TJ)

    def weighted_rows(self, table_ND: Tensor, rows_TJ: Tensor, weights_TJ: Tensor) -> Tensor:
        return row_bags(table_ND, Pairs(self, rows_TJ, len(table_ND)), weights_TJ)

    def product_key_top_k(self, query_THSC: Tensor, sub_keys_GSNC: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        return product_key_top_k(query_THSC, sub_keys_GSNC, top_k)

    def gate(self, scores_TJ: Tensor, gates_TJ: Tensor, activation: str) -> Tensor:
        """gates sigma(scores)."""
        return ACTIVATIONS[activation](scores_TJ) * gates_TJ

    def row_scores(self, x_TD: Tensor, table_ND: Tensor, pairs: Pairs) -> Tensor:
        rows_TJ = pairs.rows_TJ
        T, J = rows_TJ.shape
        if T * J == 0:
            return x_TD.new_zeros(T, J)
        offsets = torch.arange(0, T * J, J, device=x_TD.device)
        scores = _aten._embedding_bag_per_sample_weights_backward(
            x_TD, table_ND, rows_TJ.view(-1), offsets, _tokens(rows_TJ), _SUM
        )
        return scores.view(T, J)

    def row_bags(self, table_ND: Tensor, pairs: Pairs, weights_TJ: Tensor) -> Tensor:
        return F.embedding_bag(pairs.rows_TJ, table_ND, mode="sum", per_sample_weights=weights_TJ)

    def sort_pairs(self, rows_TJ: Tensor, n_rows: int) -> Runs:
        rows, order = rows_TJ.view(-1).sort(stable=True)
        _, counts = rows.unique_consecutive(return_counts=True)
        return Runs(order, order // rows_TJ.shape[1], F.pad(counts.cumsum(0), (1, 0)))

    def table_gradient(self, gradient: TableGradient, n_rows: int) -> Tensor:
        rows_TJ, coefficients_TJ, vectors_TD = gradient.pairs.rows_TJ, gradient.coefficients_TJ, gradient.vectors_TD
        T, J = rows_TJ.shape
        if T * J == 0:
            return vectors_TD.new_zeros(n_rows, vectors_TD.shape[1])
        sizes = torch.full((T,), J, device=rows_TJ.device)
        return _aten._embedding_bag_dense_backward(
            vectors_TD, rows_TJ.view(-1), _tokens(rows_TJ), sizes, sizes.new_empty(0), n_rows, False, _SUM,
            coefficients_TJ.view(-1), -1,
        )  # fmt: skip

    def adamw_rows(self, gradient: TableGradient, table_ND: Tensor, moments: Moments, adamw: AdamW) -> None:
        runs = gradient.pairs.runs
        # A row's gradient is itself a weighted sum of rows: of the vectors of its pairs' tokens.
        weights = gradient.coefficients_TJ.view(-1)[runs.order_P]
        begin = runs.starts_R[:-1]
        gradient_RD = F.embedding_bag(runs.tokens_P, gradient.vectors_TD, begin, mode="sum", per_sample_weights=weights)
        rows_R = gradient.pairs.rows_TJ.view(-1)[runs.order_P[begin]]
        update_rows(table_ND, moments, rows_R, gradient_RD, adamw)


def _tokens(rows_TJ: Tensor) -> Tensor:
    """The token of each pair."""
    T, J = rows_TJ.shape
    return torch.arange(T, device=rows_TJ.device).repeat_interleave(J)
