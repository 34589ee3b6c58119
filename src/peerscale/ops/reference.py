"""The definition of the operators on rows of tables, in plain torch and autograd, which stores every gathered row.

All backends are tested against it.
"""

import torch
from torch import Tensor

from peerscale.ops.operators import ACTIVATIONS, Operators
from peerscale.ops.pairs import Pairs, TableGradient
from peerscale.ops.row_sparse_adamw import Rates, State, update_rows


class ReferenceOperators(Operators):
    """See `Operators`."""

    name = "reference"

    def single_neuron_experts(
        self, x_TD: Tensor, w_down_ND: Tensor, w_up_ND: Tensor, rows_TJ: Tensor, gates_TJ: Tensor, activation: str
    ) -> Tensor:
        w_down_TJD = _rounded(w_down_ND[rows_TJ], x_TD.dtype)
        hidden_TJ = ACTIVATIONS[activation](torch.einsum("td,tjd->tj", x_TD.to(w_down_ND.dtype), w_down_TJD))
        return self.weighted_rows(w_up_ND, rows_TJ, hidden_TJ * gates_TJ, x_TD.dtype)

    def weighted_rows(
        self, table_ND: Tensor, rows_TJ: Tensor, weights_TJ: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        dtype = dtype or table_ND.dtype
        return torch.einsum("tj,tjd->td", weights_TJ, _rounded(table_ND[rows_TJ], dtype)).to(dtype)

    def row_dot_products(self, x_TD: Tensor, table_ND: Tensor, pairs: Pairs) -> Tensor:
        return torch.einsum("td,tjd->tj", x_TD, table_ND[pairs.rows_TJ])

    def weighted_row_sum(self, table_ND: Tensor, pairs: Pairs, weights_TJ: Tensor) -> Tensor:
        return torch.einsum("tj,tjd->td", weights_TJ, table_ND[pairs.rows_TJ])

    def table_gradient(self, gradient: TableGradient) -> Tensor:
        pairs, vectors_TD = gradient.pairs, gradient.vectors_TD
        parts_TJD = torch.einsum("tj,td->tjd", gradient.coefficients_TJ, vectors_TD)
        table_ND = vectors_TD.new_zeros(pairs.n_rows, vectors_TD.shape[1])
        return table_ND.index_add(0, pairs.rows_TJ.view(-1), parts_TJD.flatten(0, 1))

    def adamw_rows(self, gradient: TableGradient, table_ND: Tensor, state: State, rates: Rates) -> None:
        rows_R = gradient.pairs.rows_TJ.unique()
        update_rows(table_ND, state, rows_R, self.table_gradient(gradient)[rows_R], rates)


def _rounded(rows_TJD: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to the nearest numbers of `dtype`; the gradient passes unrounded."""
    if rows_TJD.dtype == dtype:
        return rows_TJD
    return rows_TJD + (rows_TJD.to(dtype) - rows_TJD).detach()
