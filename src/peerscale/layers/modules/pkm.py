"""Product-key memory (Lample et al. 2019)."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from peerscale.kernels.operators import Operators
from peerscale.layers.modules.product_keys import ProductKeyRetrieval
from peerscale.layers.pkm import PkmConfig
from peerscale.model.usage import CountsUsage


class Pkm(ProductKeyRetrieval, CountsUsage):
    """f(x) = sum over heads and their top k values of softmax_k(q . k_i) v_i; `values` is (n_experts, d_model).

    Args:
        d_model: width of input and output.
        n_experts, n_heads, top_k, d_key, settings: the settings of `PkmConfig`, where they are explained.
        kernel: the implementation of the operators (`kernels.backends`).

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
        config = PkmConfig(n_experts=n_experts, n_heads=n_heads, top_k=top_k, d_key=d_key, **settings)
        super().__init__(d_model, config, n_groups=n_groups, operators=operators)
        self.values = nn.Parameter(torch.randn(n_experts, d_model) * d_model**-0.5)

    def expert_tables(self) -> list[nn.Parameter]:
        """The parameters with a row an expert, which have a learning rate of their own."""
        return [self.values]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> y (..., D)."""
        x_TD = x.reshape(-1, x.shape[-1])
        scores_THK, rows_THK = self.retrieve(x_TD)
        gates_THK = scores_THK.softmax(dim=-1)
        if self.usage is not None:
            self.usage.add(rows_THK, gates_THK, len(x_TD))
        with torch.autocast(x.device.type, enabled=False):
            y_TD = self.operators.weighted_rows(self.values, rows_THK.flatten(1), gates_THK.flatten(1))
        return y_TD.view(x.shape).to(x.dtype)
