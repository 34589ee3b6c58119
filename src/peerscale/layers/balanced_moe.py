"""Fine-grained mixture of experts as of DeepSeek-V3 (2024): sigmoid gates, a shared expert, balance without a loss.

Shapes: M tokens, D model width, F width of an expert, E experts, K top_k, P pairs of a token and an expert.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peerscale.layers.base import FfnConfig, LayerCost, Surroundings, layer_config
from peerscale.layers.groups import mean_over_devices
from peerscale.layers.moe import Experts, RoutedExperts, cost_with_shared, grouped_product
from peerscale.layers.swiglu import Swiglu, gated_width
from peerscale.types import Positive, Rate


@layer_config
class BalancedMoeConfig(FfnConfig):
    """The defaults have the active parameters of a dense layer and the total of a coarse mixture of 16 experts."""

    method: Literal["balanced_moe"] = "balanced_moe"
    n_experts: Positive = 63
    """Routed experts."""
    n_shared: Positive = 1
    """Experts that every token uses."""
    top_k: Positive = 3
    """Routed experts per token."""
    granularity: Positive = 4
    """An expert has a `granularity`-th of the hidden units of a SwiGLU layer, in multiples of 8."""
    balance_rate: Rate = 1e-3
    """How far the bias of an expert moves in a step (Wang et al. 2024, algorithm 1)."""

    def __post_init__(self) -> None:
        if self.top_k > self.n_experts:
            raise ValueError(f"top_k {self.top_k} is more than n_experts {self.n_experts}")

    def d_expert(self, d_ff: int) -> int:
        """Hidden width of one expert."""
        return gated_width(d_ff / self.granularity)

    def cost(self, around: Surroundings) -> LayerCost:
        expert = 3 * around.d_model * self.d_expert(around.d_ff)
        return cost_with_shared(around.d_model, expert, self.n_experts, self.top_k, self.n_shared)

    def build(self, around: Surroundings) -> nn.Module:
        return BalancedMoe(around.d_model, self.d_expert(around.d_ff), self)

    def saved_numbers(self, around: Surroundings) -> int:
        hidden = self.d_expert(around.d_ff)
        return 2 * around.d_model + self.top_k * (4 * hidden + 3 * around.d_model) + self.n_shared * 4 * hidden

    def columns(self, d_model: int) -> dict[str, Any]:
        return {"n_experts": self.n_experts, "top_k": self.top_k, "active_experts": self.top_k + self.n_shared}


class GatedExperts(Experts):
    """E SwiGLU layers side by side."""

    def __init__(self, n_experts: int, d_model: int, d_expert: int) -> None:
        super().__init__(n_experts, d_model, d_expert)
        self.gate = nn.Parameter(torch.randn(n_experts, d_model, d_expert) * d_model**-0.5)

    def grouped(self, x_PD: Tensor, rows_E: Tensor) -> Tensor:
        gate_PF, up_PF = (grouped_product(x_PD, weight, rows_E) for weight in (self.gate, self.up))
        return grouped_product(F.silu(gate_PF) * up_PF, self.down, rows_E)


class BalancedMoe(RoutedExperts):
    """f(x) = shared(x) + sum over the top k experts of g_i(x) SwiGLU_i(x) (DeepSeek-V3, equations 12 to 16).

    s(x) = sigmoid(W x). Experts are chosen by s + b and weighted by s, divided by its sum over those chosen; b has no
    gradient. After every step b rises by `balance_rate` for experts that had fewer tokens than the mean and falls for
    those that had more; its mean is taken out, as torchtitan does, which changes no choice (Wang et al. 2024).

    Left out, since they belong to many more experts on many devices: the factor 2.5 on the gates, groups of experts,
    and the small loss that balances each sequence. Not stated: initial weights, here of variance 1 / fan-in.
    """

    def __init__(self, d_model: int, d_expert: int, config: BalancedMoeConfig) -> None:
        super().__init__(d_model, d_expert, config.n_experts, GatedExperts)
        self.top_k, self.balance_rate = config.top_k, config.balance_rate
        self.shared = Swiglu(d_model, config.n_shared * d_expert)  # experts without gates are one wider layer
        self.register_buffer("bias_E", torch.zeros(self.n_experts))
        self.register_buffer("load_E", torch.zeros(self.n_experts))
        self.bias_E: Tensor
        self.load_E: Tensor

    def init_weights(self, output_scale: float) -> None:
        super().init_weights(output_scale)
        self.shared.init_weights(output_scale)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> y (..., D)."""
        x_MD = x.reshape(-1, x.shape[-1])
        scores_ME = self.route(x_MD)[1].sigmoid()
        expert_MK = (scores_ME.detach() + self.bias_E).topk(self.top_k, dim=-1).indices
        scores_MK = scores_ME.gather(-1, expert_MK)
        gates_MK = scores_MK / scores_MK.sum(-1, keepdim=True)
        load_E = torch.zeros_like(self.load_E).index_add(0, expert_MK.flatten(), torch.ones_like(gates_MK).flatten())
        if self.training:
            self.load_E += load_E
        if self.usage is not None:
            self.usage.add(expert_MK, gates_MK, len(x_MD))
        return self.shared(x) + self.weighted(x_MD, expert_MK, gates_MK, load_E.long()).view(x.shape)

    def after_step(self) -> None:
        """Move the biases towards equal loads, by the loads since the last step on all devices."""
        load_E = mean_over_devices(self.load_E)
        self.bias_E += self.balance_rate * (load_E.mean() - load_E).sign()
        self.bias_E -= self.bias_E.mean()
        self.load_E.zero_()
