"""Token-choice mixture of narrow routed experts and shared experts: DeepSeekMoE (Dai et al. 2024, section 3)."""

from typing import Any, Literal

from torch import Tensor, nn

from peerscale.layers.base import LayerCost, Surroundings, layer_config
from peerscale.layers.dense import Dense
from peerscale.layers.moe import RoutedConfig, TokenChoiceMoe, cost_with_shared
from peerscale.types import Positive


@layer_config
class FineGrainedMoeConfig(RoutedConfig):
    """The default numbers give the active parameters of dense and the total of a coarse mixture of 16 experts."""

    method: Literal["fine_grained_moe"] = "fine_grained_moe"
    n_experts: Positive = 63
    """Routed experts; with one shared, the size of 16 dense layers, as in the coarse mixture and the paper's section
    4.1.3."""
    n_shared: Positive = 1
    """Experts that every token uses."""
    top_k: Positive = 3
    """Routed experts per token. The paper uses 7; 3 and the shared one have the active parameters of dense."""
    granularity: Positive = 4
    """m: an expert has d_ff / m hidden units."""

    def d_expert(self, d_ff: int) -> int:
        """Hidden width of one expert."""
        return d_ff // self.granularity

    def cost(self, around: Surroundings) -> LayerCost:
        expert = 2 * around.d_model * self.d_expert(around.d_ff)
        return cost_with_shared(around.d_model, expert, self.n_experts, self.top_k, self.n_shared)

    def build(self, around: Surroundings) -> nn.Module:
        return FineGrainedMoe(around.d_model, around.d_ff, self, around.group_sequences)

    def saved_numbers(self, around: Surroundings) -> int:
        hidden = self.d_expert(around.d_ff)
        of_routed = self.top_k * (2 * hidden + 3 * around.d_model)
        return 2 * around.d_model + of_routed + self.n_shared * 2 * hidden

    @property
    def takes_statistics(self) -> bool:
        return self.load_balance_weight > 0

    def unusable(self, around: Surroundings) -> str:
        divides = around.d_ff % self.granularity == 0
        return "" if divides else f"ffn.granularity {self.granularity} does not divide d_ff {around.d_ff}"

    def columns(self, d_model: int) -> dict[str, Any]:
        return {"n_experts": self.n_experts, "top_k": self.top_k, "active_experts": self.top_k + self.n_shared}


class FineGrainedMoe(TokenChoiceMoe):
    """f(x) = sum of the shared experts + sum over the top k routed experts of s_i(x) FFN_i(x) (equations 9 to 11).

    s is the softmax over all routed experts and is not normalised again over the top k. `auxiliary_loss` is as in
    `TokenChoiceMoe`, without the z loss: the paper's expert-level balance loss (equations 12 to 14), of which
    `load_balance_weight` is alpha_1 (0.01 in section 4.1.3).
    """

    def __init__(
        self, d_model: int, d_ff: int, config: FineGrainedMoeConfig, group_sequences: int | None = None
    ) -> None:
        super().__init__(d_model, config.d_expert(d_ff), config, group_sequences)
        # The sum of experts without gates is one dense layer of their total width.
        self.shared = Dense(d_model, config.n_shared * config.d_expert(d_ff))

    def init_weights(self, output_scale: float) -> None:
        super().init_weights(output_scale)
        self.shared.init_weights(output_scale)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> y (..., D)."""
        return self.shared(x) + super().forward(x)
