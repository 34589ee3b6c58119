"""The definition of the operators (`Operators`), in plain torch; it materialises every gathered row."""

import torch
from torch import Tensor

from peerscale.kernels.activations import ACTIVATIONS
from peerscale.kernels.backbone import Backbone
from peerscale.kernels.product_keys import product_key_top_k


class Reference(Backbone):
    """See `Operators`."""

    def single_neuron_experts(
        self, x_TD: Tensor, w_down_ND: Tensor, w_up_ND: Tensor, rows_TJ: Tensor, gates_TJ: Tensor, activation: str
    ) -> Tensor:
        hidden_TJ = ACTIVATIONS[activation](torch.einsum("td,tjd->tj", x_TD, w_down_ND[rows_TJ]))
        return self.weighted_rows(w_up_ND, rows_TJ, hidden_TJ * gates_TJ)

    def weighted_rows(self, table_ND: Tensor, rows_TJ: Tensor, weights_TJ: Tensor) -> Tensor:
        return torch.einsum("tj,tjd->td", weights_TJ, table_ND[rows_TJ])

    def product_key_top_k(self, query_THSC: Tensor, sub_keys_GSNC: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        return product_key_top_k(query_THSC, sub_keys_GSNC, top_k)
