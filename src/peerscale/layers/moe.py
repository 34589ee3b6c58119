"""Mixtures of experts: coarse, and fine-grained with shared experts."""

from typing import Annotated, Any, Literal

from pydantic import Field

from peerscale.config.types import Positive, Rate
from peerscale.layers.base import FfnConfig, LayerCost, Surroundings, layer_config, module_class


@layer_config
class MoeConfig(FfnConfig):
    """Coarse mixture of experts: every expert is a full dense feed-forward layer."""

    method: Literal["moe"] = "moe"
    routing: Literal["expert_choice", "token_choice"] = "expert_choice"
    n_experts: Positive = 16
    capacity_factor: Rate = 1.0
    """Expert choice: mean experts per token. Not stated in the paper; 1 gives the active parameters of dense."""
    top_k: Positive = 1
    """Token choice: experts per token."""
    load_balance_weight: Annotated[float, Field(ge=0)] = 1e-2
    """Token choice: weight of the load-balance loss (Fedus et al. 2021)."""
    z_loss_weight: Annotated[float, Field(ge=0)] = 1e-3
    """Token choice: weight of mean(logsumexp^2) of the router scores (Zoph et al. 2022)."""

    def __post_init__(self) -> None:
        if self.top_k > self.n_experts:
            raise ValueError(f"top_k {self.top_k} is more than n_experts {self.n_experts}")

    @property
    def chooses_tokens(self) -> bool:
        """Whether experts choose tokens (expert choice) rather than tokens experts (token choice)."""
        return self.routing == "expert_choice"

    def cost(self, around: Surroundings) -> LayerCost:
        router, expert = around.d_model * self.n_experts, 2 * around.d_model * around.d_ff
        active = self._active_experts(around.group_sequences)
        return LayerCost(
            params={"router": router, "experts": self.n_experts * expert},
            inactive=round((self.n_experts - active) * expert),
            forward_flops={"router": 2 * router, "experts": round(2 * active * expert)},
        )

    def build(self, around: Surroundings) -> Any:
        if self.chooses_tokens:
            return module_class("moe.ExpertChoiceMoe")(around.d_model, around.d_ff, self, around.groups_at_once)
        return module_class("moe.TokenChoiceMoe")(around.d_model, around.d_ff, self, around.groups_at_once)

    def unusable(self, around: Surroundings) -> str:
        sequences = around.group_sequences
        if not self.chooses_tokens or self.capacity(sequences) is not None:
            return ""
        return (
            f"expert choice needs a whole capacity in 1..{sequences}: {sequences} sequences x "
            f"{self.capacity_factor:g} / {self.n_experts} experts = "
            f"{sequences * self.capacity_factor / self.n_experts:g}"
        )

    def saved_numbers(self, around: Surroundings) -> int:
        # Chosen tokens are copied for the experts; the experts' outputs are kept for the gates.
        rows = max(1.0, self._active_experts(around.group_sequences))
        return round(2 * around.d_model + rows * (2 * around.d_ff + 3 * around.d_model))

    @property
    def takes_statistics(self) -> bool:
        return self.chooses_tokens or self.load_balance_weight > 0

    def capacity(self, sequences: int) -> int | None:
        """Tokens that an expert takes at each position of a group of so many sequences.

        None if that is not a whole number, less than one, or more than the group has.
        """
        capacity = sequences * self.capacity_factor / self.n_experts
        whole = round(capacity)
        return whole if abs(capacity - whole) < 1e-9 * capacity and 1 <= whole <= sequences else None

    def _active_experts(self, sequences: int) -> float:
        """Experts per token, on average."""
        if not self.chooses_tokens:
            return self.top_k
        capacity = self.capacity(sequences)
        return self.capacity_factor if capacity is None else capacity * self.n_experts / sequences

    def routed(self) -> tuple[int, int]:
        return self.n_experts, 1 if self.chooses_tokens else self.top_k

    def columns(self, d_model: int) -> dict[str, Any]:
        if self.chooses_tokens:
            own = {"capacity_factor": self.capacity_factor, "active_experts": self.capacity_factor}
        else:
            own = {"top_k": self.top_k, "active_experts": self.top_k}
        return {"n_experts": self.n_experts, **own}


@layer_config
class FineGrainedMoeConfig(FfnConfig):
    """Token-choice mixture of narrow routed experts and shared experts (DeepSeekMoE, Dai et al. 2024, section 3)."""

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
        return module_class("moe.FineGrainedMoe")(around.d_model, around.d_ff, self, around.groups_at_once)

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

    def routed(self) -> tuple[int, int]:
        return self.n_experts, self.top_k

    def columns(self, d_model: int) -> dict[str, Any]:
        return {"n_experts": self.n_experts, "active_experts": self.top_k + self.n_shared}
