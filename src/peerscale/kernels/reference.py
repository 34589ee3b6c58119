"""The definition of the two retrieved-row operators, in plain torch; it materialises every gathered row.

Shapes: T tokens, D model width, N rows of a table, J retrieved rows a token (heads x top_k).
"""

import torch
from torch import Tensor

from peerscale.kernels.activations import ACTIVATIONS


def row_scores(x_TD: Tensor, table_ND: Tensor, indices_TJ: Tensor) -> Tensor:
    """s[t, j] = <x[t], table[indices[t, j]]>."""
    return torch.einsum("td,tjd->tj", x_TD, table_ND[indices_TJ])


def weighted_rows(table_ND: Tensor, indices_TJ: Tensor, weights_TJ: Tensor) -> Tensor:
    """y[t] = sum_j weights[t, j] table[indices[t, j]]: a product-key memory (Lample et al. 2019)."""
    return torch.einsum("tj,tjd->td", weights_TJ, table_ND[indices_TJ])


def single_neuron_experts(
    x_TD: Tensor, w_down_ND: Tensor, w_up_ND: Tensor, indices_TJ: Tensor, gates_TJ: Tensor, activation: str
) -> Tensor:
    """y[t] = sum_j gates[t, j] sigma(<x[t], w_down[i]>) w_up[i], i = indices[t, j] (PEER, equations 6 and 7)."""
    hidden_TJ = ACTIVATIONS[activation](row_scores(x_TD, w_down_ND, indices_TJ))
    return weighted_rows(w_up_ND, indices_TJ, hidden_TJ * gates_TJ)
