"""Fine-grained mixture of experts with shared experts, in the manner of DeepSeekMoE (Dai et al. 2024, section 3)."""

from typing import Annotated, Any, Literal

from pydantic import Field

from peerscale.config_types import Positive
from peerscale.layers.base import FfnConfig, LayerCost, Surroundings, layer_config, module_class


@layer_config
class FineGrainedMoeConfig(FfnConfig):
    """Token-choice mixture of narrow experts and shared ones (DeepSeekMoE, Dai et al. 2024)."""

    method: Literal["fine_grained_moe"] = "fine_grained_moe"
    n_experts: Positive = 63
    """Routed experts; with one shared, 16 dense layers in all, as the coarse mixture and the paper's section 4.1.3."""
    n_shared: Positive = 1
    """Experts that every token uses."""
    top_k: Positive = 3
    """Routed experts per token. The paper takes 7; 3 and the shared one have the active parameters of dense."""
    granularity: Positive = 4
    """m: an expert has d_ff / m hidden units."""
    load_balance_weight: Annotated[float, Field(ge=0)] = 1e-2
    """alpha_1 of the expert-level balance loss (equation 12; 0.01 in section 4.1.3)."""

    def __post_init__(self) -> None:
        if self.top_k > self.n_experts:
            raise ValueError(f"top_k {self.top_k} is more than n_experts {self.n_experts}")

    def d_expert(self, d_ff: int) -> int:
        """Hidden width of one expert."""
        return d_ff // self.granularity

    def cost(self, around: Surroundings) -> LayerCost:
        router, expert = around.d_model * self.n_experts, 2 * around.d_model * self.d_expert(around.d_ff)
        shared = self.n_shared * expert
        return LayerCost(
            params={"router": router, "experts": self.n_experts * expert, "shared_experts": shared},
            inactive=(self.n_experts - self.top_k) * expert,
            forward_flops={"router": 2 * router, "experts": 2 * self.top_k * expert, "shared_experts": 2 * shared},
        )

    def build(self, around: Surroundings) -> Any:
        return module_class("fine_grained_moe.FineGrainedMoe")(around.d_model, around.d_ff, self)

    def unusable(self, around: Surroundings) -> str:
        divides = around.d_ff % self.granularity == 0
        return "" if divides else f"ffn.granularity {self.granularity} does not divide d_ff {around.d_ff}"

    def routed(self) -> tuple[int, int]:
        return self.n_experts, self.top_k

    def columns(self, d_model: int) -> dict[str, Any]:
        return {"n_experts": self.n_experts, "active_experts": self.top_k + self.n_shared}
