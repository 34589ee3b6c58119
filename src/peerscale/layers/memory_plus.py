"""Memory+ (Berges et al. 2024): product-key memory with a gate, and one table of values for all replaced blocks.

Shapes: T tokens, D model width, J retrieved values per token (heads x top_k).
"""

from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from peerscale.layers.base import LayerCost, Surroundings, layer_config
from peerscale.layers.pkm import Pkm
from peerscale.layers.product_keys import RetrievalConfig


@layer_config
class MemoryPlusConfig(RetrievalConfig):
    """The settings. The defaults are the paper's: no BatchNorm, a set of keys for each head, a gate."""

    method: Literal["memory_plus"] = "memory_plus"
    query_norm: bool = False
    shared_keys: bool = False
    gate: bool = True
    """W2 (m * silu(W1 x)) in place of m, the sum of the retrieved values (section 3.3)."""
    shared_values: bool = True
    """One table of values for all replaced blocks (section 3.2); queries and keys are each block's own."""

    ROWS_PER_EXPERT: ClassVar[int] = 1

    def cost(self, around: Surroundings) -> LayerCost:
        memory, d_model = RetrievalConfig.cost(self, around), around.d_model
        return LayerCost(
            params=memory.params | ({"gate": 2 * d_model * (d_model + 1)} if self.gate else {}),
            forward_flops=memory.forward_flops | ({"gate": 4 * d_model * d_model} if self.gate else {}),
            inactive=memory.inactive,
            shared={"experts": self.n_experts * d_model} if self.shared_values else {},
        )

    def saved_numbers(self, around: Surroundings) -> int:
        return RetrievalConfig.saved_numbers(self, around) + 4 * around.d_model * self.gate

    def build(self, around: Surroundings) -> nn.Module:
        layer = MemoryPlus(**self.arguments(around))
        if self.shared_values and isinstance(around.first, MemoryPlus):
            layer.values = around.first.values
        return layer


class MemoryPlus(Pkm):
    """f(x) = W2 (m(x) * silu(W1 x)), where m(x) is a product-key memory (Berges et al. 2024, section 3).

    Initial weights as in the paper's code: keys uniform within d_key^-1/2, values and gate of variance 1 / d_model,
    unscaled. Values are trained with `optim.table_lr`, outside the clip of the gradient's norm; the code clips them by
    themselves.
    """

    CONFIG = MemoryPlusConfig

    def __init__(self, d_model: int, *arguments: Any, **settings: Any) -> None:
        super().__init__(d_model, *arguments, **settings)
        assert isinstance(self.config, MemoryPlusConfig)
        bound = (2 * self.sub_keys.shape[-1]) ** -0.5
        nn.init.uniform_(self.sub_keys, -bound, bound)
        self.gate_in = self.gate_out = None
        if self.config.gate:
            self.gate_in, self.gate_out = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)
            for linear in (self.gate_in, self.gate_out):
                nn.init.normal_(linear.weight, std=d_model**-0.5)
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> y (..., D)."""
        memory = super().forward(x)
        if self.gate_in is None or self.gate_out is None:
            return memory
        return self.gate_out(memory * F.silu(self.gate_in(x)))
