"""PEER: parameter-efficient expert retrieval (He 2024, section 2 and algorithm 1)."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from peerscale.kernels.operators import Operators
from peerscale.layers.modules.product_keys import ProductKeyRetrieval
from peerscale.layers.peer import PeerConfig
from peerscale.model.usage import CountsUsage


class Peer(ProductKeyRetrieval, CountsUsage):
    """f(x) = sum over heads and their top k experts of g_i(x) sigma(u_i . x) v_i.

    No bias, norm, dropout or output projection (algorithm 1). `w_down` holds the u, `w_up` the v, both
    (n_experts, d_model).

    Args:
        d_model: width of input and output.
        n_experts, n_heads, top_k, d_key, settings: the settings of `PeerConfig`, where they are explained.
        n_groups, operators: see `ProductKeyRetrieval`.

    Raises:
        ValueError: settings that cannot be.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        n_heads: int,
        top_k: int,
        d_key: int | Literal["half_d_model"] = "half_d_model",
        *,
        n_groups: int = 1,
        operators: Operators | None = None,
        **settings: Any,
    ) -> None:
        config = PeerConfig(n_experts=n_experts, n_heads=n_heads, top_k=top_k, d_key=d_key, **settings)
        super().__init__(d_model, config, n_groups=n_groups, operators=operators)
        self.activation, self.score = config.activation, config.score
        # Not stated in the paper: rows of norm about 1, so that u . x has the variance of x's features.
        self.w_down = nn.Parameter(torch.randn(n_experts, d_model) * d_model**-0.5)
        self.w_up = nn.Parameter(torch.randn(n_experts, d_model) * d_model**-0.5)

    def expert_tables(self) -> list[nn.Parameter]:
        """The parameters with a row an expert, which have a learning rate of their own."""
        return [self.w_down, self.w_up]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> y (..., D)."""
        x_TD = x.reshape(-1, x.shape[-1])
        scores_THK, rows_THK = self.retrieve(x_TD)
        gates_THK = scores_THK.softmax(dim=-1) if self.score == "softmax" else scores_THK.sigmoid()
        if self.usage is not None:
            self.usage.add(rows_THK, gates_THK, len(x_TD))
        with torch.autocast(x.device.type, enabled=False):
            y_TD = self.operators.single_neuron_experts(
                x_TD.to(self.w_down.dtype),
                self.w_down,
                self.w_up,
                rows_THK.flatten(1),
                gates_THK.flatten(1),
                self.activation,
            )
        return y_TD.view(x.shape).to(x.dtype)
