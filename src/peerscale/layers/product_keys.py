"""Layers that retrieve rows by product keys: product-key memory (Lample et al. 2019) and PEER (He 2024)."""

from dataclasses import fields
from math import isqrt
from typing import Any, ClassVar, Literal

from peerscale.config.types import Positive
from peerscale.layers.base import FfnConfig, LayerCost, Surroundings, layer_config, module_class


@layer_config
class RetrievalConfig(FfnConfig):
    """The settings and the cost that both layers share."""

    n_experts: Positive
    n_heads: Positive
    top_k: Positive
    d_key: Literal["half_d_model"] | Positive = "half_d_model"
    """Query and key width per head, both halves together. Not stated in the paper; half_d_model is d_model / 2, rounded
    up to a multiple of 4 and at least 8, because a fixed 128 would cost small models more than the retrieved experts.
    """
    query_norm: bool = True
    """BatchNorm on the queries (paper, section 3.4)."""
    query_bias: bool = True
    """Not stated in the paper; on in the product-key memory code that the paper refers to."""
    shared_keys: bool = True
    """One set of product keys for all heads (paper, section 2), or one per head (the code that the paper refers to)."""

    ROWS_PER_EXPERT: ClassVar[int]
    """Number of table rows, of d_model numbers each, per expert."""
    MODULE: ClassVar[str]
    """The layer's class in `layers.modules`."""

    def __post_init__(self) -> None:
        side = isqrt(self.n_experts)
        if side * side != self.n_experts:
            raise ValueError(
                f"n_experts {self.n_experts} is not a square (product keys); nearest: {side**2}, {(side + 1) ** 2}"
            )
        if self.top_k > side:
            raise ValueError(f"top_k {self.top_k} is more than the {side} sub-keys of a side; allowed: 1..{side}")
        if self.d_key != "half_d_model" and self.d_key % 2:
            raise ValueError(f"d_key {self.d_key} is odd, but a key has two equal halves")

    @property
    def n_keys(self) -> int:
        """Sub-keys per side: sqrt(n_experts) (paper, equation 4)."""
        return isqrt(self.n_experts)

    @property
    def n_key_sets(self) -> int:
        """Number of sets of product keys: 1, or 1 per head."""
        return 1 if self.shared_keys else self.n_heads

    @property
    def active_experts(self) -> int:
        """Experts that one token retrieves."""
        return self.n_heads * self.top_k

    def resolved_d_key(self, d_model: int) -> int:
        """`d_key` for this model width; half_d_model is rounded up to a multiple of 4, so that halves are even."""
        return max(8, -(-d_model // 8) * 4) if self.d_key == "half_d_model" else self.d_key

    def cost(self, around: Surroundings) -> LayerCost:
        """The cost of product-key retrieval and of a weighted sum of table rows (paper, section 2)."""
        d_model, d_key, heads = around.d_model, self.resolved_d_key(around.d_model), self.n_heads
        expert = self.ROWS_PER_EXPERT * d_model
        params = {
            "query": heads * d_key * (d_model + self.query_bias),
            "sub_keys": self.n_key_sets * self.n_keys * d_key,
            "experts": self.n_experts * expert,
        }
        if self.query_norm:
            params["query_norm"] = 2 * heads * d_key
        return LayerCost(
            params=params,
            inactive=max(0, self.n_experts - self.active_experts) * expert,
            forward_flops={
                "query": 2 * d_model * heads * d_key,
                "sub_keys": 2 * heads * self.n_keys * d_key,
                "experts": 2 * self.active_experts * expert,
            },
        )

    def build(self, around: Surroundings) -> Any:
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("method", "variant")}
        return module_class(self.MODULE)(
            around.d_model,
            n_groups=around.groups_at_once,
            n_passes=around.micro_batches,
            operators=around.operators,
            **settings,
        )

    def saved_numbers(self, around: Surroundings) -> int:
        queries = self.n_heads * self.resolved_d_key(around.d_model)  # counted twice below: before and after their norm
        return 2 * around.d_model + 2 * queries + 8 * self.active_experts

    def copied_parameters(self, around: Surroundings) -> int:
        return self.n_experts * self.ROWS_PER_EXPERT * around.d_model

    @property
    def takes_statistics(self) -> bool:
        return self.query_norm

    def routed(self) -> tuple[int, int]:
        return self.n_experts, self.active_experts

    def columns(self, d_model: int) -> dict[str, Any]:
        return {
            "n_experts": self.n_experts,
            "ffn_heads": self.n_heads,
            "top_k": self.top_k,
            "d_key": self.resolved_d_key(d_model),
            "query_norm": self.query_norm,
            "active_experts": self.active_experts,
        }


@layer_config
class PkmConfig(RetrievalConfig):
    """Product-key memory (Lample et al. 2019): retrieved values that do not depend on the input."""

    method: Literal["pkm"] = "pkm"

    ROWS_PER_EXPERT: ClassVar[int] = 1
    MODULE: ClassVar[str] = "product_keys.Pkm"


@layer_config
class PeerConfig(RetrievalConfig):
    """Parameter-efficient expert retrieval (He 2024): retrieved experts of one neuron each."""

    method: Literal["peer"] = "peer"
    activation: Literal["gelu", "relu"] = "gelu"
    """Not stated in the paper ("e.g. ReLU or GELU")."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """Applied over the retrieved experts of each head (paper, equation 2 and algorithm 1)."""

    ROWS_PER_EXPERT: ClassVar[int] = 2
    MODULE: ClassVar[str] = "product_keys.Peer"

    def columns(self, d_model: int) -> dict[str, Any]:
        return {**RetrievalConfig.columns(self, d_model), "granularity": self.active_experts}
