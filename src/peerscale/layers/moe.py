"""Coarse mixtures of experts, whose experts are full dense layers: expert choice and token choice.

Shapes: B sequences, T tokens per sequence, D model width, F width of an expert, E experts, G groups of sequences,
S sequences per group, C sequences that an expert chooses in a group at each position (capacity), K top_k, M tokens of
the whole input, P pairs of a token and an expert.
"""

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from peerscale.layers.base import FfnConfig, LayerCost, Surroundings, layer_config
from peerscale.layers.groups import gather, is_spread, mean_over_devices, n_groups
from peerscale.layers.usage import CountsUsage
from peerscale.types import Positive, Rate


@layer_config
class RoutedConfig(FfnConfig):
    """The settings of every mixture of experts."""

    SHARES_OF_PEAK = (0.23, 0.23)

    n_experts: Positive = 16
    top_k: Positive = 1
    """Token choice: experts per token."""
    load_balance_weight: Annotated[float, Field(ge=0)] = 1e-2
    """Token choice: weight of the load-balance loss (Fedus et al. 2021)."""

    def __post_init__(self) -> None:
        if self.top_k > self.n_experts:
            raise ValueError(f"top_k {self.top_k} is more than n_experts {self.n_experts}")


@layer_config
class MoeConfig(RoutedConfig):
    """Coarse mixture of experts: every expert is a full dense feed-forward layer."""

    method: Literal["moe"] = "moe"
    routing: Literal["expert_choice", "token_choice"] = "expert_choice"
    capacity_factor: Rate = 1.0
    """Expert choice: mean experts per token. Not stated in the paper; 1 gives the active parameters of dense."""
    z_loss_weight: Annotated[float, Field(ge=0)] = 1e-3
    """Token choice: weight of mean(logsumexp^2) of the router scores (Zoph et al. 2022)."""

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

    def build(self, around: Surroundings) -> nn.Module:
        if self.chooses_tokens:
            return ExpertChoiceMoe(around.d_model, around.d_ff, self, around.group_sequences)
        return TokenChoiceMoe(around.d_model, around.d_ff, self, around.group_sequences, self.z_loss_weight)

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

    def columns(self, d_model: int) -> dict[str, Any]:
        if self.chooses_tokens:
            own = {"capacity_factor": self.capacity_factor, "active_experts": self.capacity_factor}
        else:
            own = {"top_k": self.top_k, "active_experts": self.top_k}
        return {"n_experts": self.n_experts, **own}


class Experts(nn.Module):
    """E dense layers side by side, with initial weights of variance 1 / fan-in."""

    def __init__(self, n_experts: int, d_model: int, d_expert: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(n_experts, d_model, d_expert) * d_model**-0.5)
        self.down = nn.Parameter(torch.randn(n_experts, d_expert, d_model) * d_expert**-0.5)

    def init_weights(self, output_scale: float) -> None:
        """Keep the constructor's weights; multiply those of the second matrix product by `output_scale`."""
        self.down.data *= output_scale

    def forward(self, x_EMD: Tensor) -> Tensor:
        """Apply each expert to its own rows; all experts have the same number of rows."""
        return F.gelu(x_EMD @ self.up) @ self.down

    def grouped(self, x_PD: Tensor, rows_E: Tensor) -> Tensor:
        """Apply each expert to its own rows, which are sorted by expert; `rows_E` has the number of rows per expert."""
        return grouped_product(F.gelu(grouped_product(x_PD, self.up, rows_E)), self.down, rows_E)


def grouped_product(x_PD: Tensor, weight_EDF: Tensor, rows_E: Tensor) -> Tensor:
    """The first rows_E[0] rows times weight_EDF[0], the next rows_E[1] times weight_EDF[1], and so on: (P, F)."""
    if torch.is_autocast_enabled(x_PD.device.type):  # autocast does not cover torch's grouped product
        dtype = torch.get_autocast_dtype(x_PD.device.type)
        x_PD, weight_EDF = x_PD.to(dtype), weight_EDF.to(dtype)
    # torch has it since 2.10, not in float64, for rows of a multiple of 16 bytes.
    aligned = all(width * x_PD.element_size() % 16 == 0 for width in weight_EDF.shape[1:])
    if hasattr(F, "grouped_mm") and x_PD.dtype != torch.float64 and aligned:
        return F.grouped_mm(x_PD, weight_EDF, offs=rows_E.cumsum(0, dtype=torch.int32))
    return torch.cat([x @ weight for x, weight in zip(x_PD.split(rows_E.tolist()), weight_EDF, strict=True)])


class RoutedExperts(nn.Module, CountsUsage):
    """Experts, and a router whose scores choose among them."""

    def __init__(self, d_model: int, d_expert: int, n_experts: int, kind: type[Experts] = Experts) -> None:
        super().__init__()
        self.n_experts = n_experts
        self.router = nn.Linear(d_model, n_experts, bias=False)
        self.experts = kind(n_experts, d_model, d_expert)

    def init_weights(self, output_scale: float) -> None:
        """Draw the router's weights, of variance 1 / fan-in, and scale each expert's second product."""
        nn.init.normal_(self.router.weight, std=self.router.in_features**-0.5)
        self.experts.init_weights(output_scale)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (..., D) -> softmax over the experts, and the scores, both (..., E) and always in fp32."""
        with torch.autocast(x.device.type, enabled=False):
            scores = self.router(x.to(self.router.weight.dtype))
            return scores.softmax(dim=-1), scores

    def weighted(self, x_MD: Tensor, expert_MK: Tensor, gates_MK: Tensor, rows_E: Tensor) -> Tensor:
        """The sum over each token's experts of gate times output (M, D); `rows_E` has the number of rows per expert."""
        # Sorted by expert, so that the pairs of one expert are consecutive rows.
        order_P = expert_MK.flatten().argsort(stable=True)
        x_PD = x_MD.unsqueeze(1).expand(-1, expert_MK.shape[1], -1).reshape(-1, x_MD.shape[-1])
        y_PD = self.experts.grouped(x_PD.index_select(0, order_P), rows_E)
        y_MKD = torch.zeros_like(y_PD).index_copy(0, order_P, y_PD).view(*expert_MK.shape, x_MD.shape[-1])
        return (y_MKD * gates_MK.unsqueeze(-1).to(x_MD.dtype)).sum(1)


class ExpertChoiceMoe(RoutedExperts):
    """Every expert chooses its tokens (Zhou et al. 2022), so that all experts have equal work.

    Experts choose among the tokens at the same position in all sequences of a group (as in Krajewski et al. 2024), so
    that no sequence sees its own future. The output of a sequence depends on the others in its group.

    Args:
        group_sequences: sequences in a group, on all devices; None: the whole input is one group.

    Raises (forward):
        ValueError: if a group's sequences x capacity_factor / n_experts is not a whole number in 1..sequences.
    """

    def __init__(self, d_model: int, d_expert: int, config: MoeConfig, group_sequences: int | None = None) -> None:
        super().__init__(d_model, d_expert, config.n_experts)
        self.config, self.group_sequences = config, group_sequences

    def forward(self, x_BTD: Tensor) -> Tensor:
        """x (B, T, D) -> y (B, T, D)."""
        B, T, D = x_BTD.shape
        gates_BTE = self.route(x_BTD)[0]
        if is_spread(B, self.group_sequences):
            groups, chosen_BTE = 1, self._chosen_among_all(gates_BTE)
            gates_BTE, capacity = gates_BTE * chosen_BTE, int(chosen_BTE.sum(0).max())
        else:
            groups = n_groups(B, self.group_sequences)
            capacity = self._capacity(B // groups)
        gates_ETGC, place_ETGC = gates_BTE.permute(2, 1, 0).unflatten(-1, (groups, -1)).topk(capacity, dim=-1)
        if groups > 1:
            # Sorted by sequence, which fixes the order of the sums over an expert's tokens.
            place_ETGC, order_ETGC = place_ETGC.sort(dim=-1)
            gates_ETGC = gates_ETGC.gather(-1, order_ETGC)
        first_G1 = torch.arange(0, B, B // groups, device=x_BTD.device)[:, None]
        # From here on, N = G C are all sequences of the input that an expert chose at a position.
        gates_ETN, sequence_ETN = gates_ETGC.flatten(-2), (place_ETGC + first_G1).flatten(-2)
        if self.usage is not None:
            expert_ETN = torch.arange(self.n_experts, device=x_BTD.device)[:, None, None].expand_as(gates_ETN)
            self.usage.add(expert_ETN, gates_ETN, B * T)
        # Row of each chosen token in the input as (B x T, D).
        token_EM = (sequence_ETN * T + torch.arange(T, device=x_BTD.device)[:, None]).flatten(1)
        x_MD = x_BTD.reshape(B * T, D)
        x_EMD = x_MD.index_select(0, token_EM.flatten()).view(*token_EM.shape, D)
        y_EMD = self.experts(x_EMD) * gates_ETN.flatten(1).unsqueeze(-1).to(x_BTD.dtype)
        y_MD = torch.zeros_like(x_MD, dtype=y_EMD.dtype).index_add(0, token_EM.flatten(), y_EMD.flatten(0, 1))
        return y_MD.view(B, T, D)

    def _capacity(self, sequences: int) -> int:
        """Tokens that an expert takes at each position of a group."""
        capacity = self.config.capacity(sequences)
        if capacity is None:
            raise ValueError(
                f"{sequences} sequences x {self.config.capacity_factor:g} / {self.n_experts} experts "
                f"is not a whole number in 1..{sequences}"
            )
        return capacity

    def _chosen_among_all(self, gates_BTE: Tensor) -> Tensor:
        """Which of this device's tokens experts choose among those of all devices: 1 or 0 (B, T, E)."""
        gates_STE, here = gather(gates_BTE)
        chosen_STE = torch.zeros_like(gates_STE)
        return chosen_STE.scatter_(0, gates_STE.topk(self._capacity(len(gates_STE)), dim=0).indices, 1.0)[here]


class TokenChoiceMoe(RoutedExperts):
    """Every token chooses its top k experts; no token is dropped and the output does not depend on the batch.

    After a forward pass in training `auxiliary_loss` is the weighted sum of the load-balance loss, E sum_i f_i P_i with
    f_i the share of tokens and P_i the mean probability of expert i (Fedus et al. 2021), and the z loss,
    mean(logsumexp(scores)^2) (Zoph et al. 2022). f and P are computed per group of sequences; the loss is the mean over
    groups.

    Args:
        group_sequences: sequences in a group, on all devices; None: the whole input is one group.
    """

    def __init__(
        self,
        d_model: int,
        d_expert: int,
        config: RoutedConfig,
        group_sequences: int | None = None,
        z_loss_weight: float = 0.0,
    ) -> None:
        super().__init__(d_model, d_expert, config.n_experts)
        self.config, self.top_k, self.group_sequences = config, config.top_k, group_sequences
        self.z_loss_weight = z_loss_weight
        self.auxiliary_loss: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> y (..., D)."""
        x_MD = x.reshape(-1, x.shape[-1])
        probabilities_ME, scores_ME = self.route(x_MD)
        gates_MK, expert_MK = probabilities_ME.topk(self.top_k, dim=-1)
        expert_GP = expert_MK.view(n_groups(len(x), self.group_sequences), -1)
        # Not `bincount`, which waits for the device to find the highest index.
        load_GE = expert_GP.new_zeros(len(expert_GP), self.n_experts)
        load_GE.scatter_add_(1, expert_GP, torch.ones_like(expert_GP))
        if self.training:
            share_GE = load_GE.to(probabilities_ME.dtype) / expert_GP.shape[1]
            if is_spread(len(x), self.group_sequences):
                # The probabilities need no mean over devices: that of the losses' gradients is enough.
                share_GE = mean_over_devices(share_GE)
            mean_GE = probabilities_ME.unflatten(0, (len(expert_GP), -1)).mean(1)
            balance = self.n_experts * (share_GE * mean_GE).sum(-1).mean()
            z_loss = scores_ME.logsumexp(-1).square().mean()
            self.auxiliary_loss = self.config.load_balance_weight * balance + self.z_loss_weight * z_loss
        if self.usage is not None:
            self.usage.add(expert_MK, gates_MK, len(x_MD))
        return self.weighted(x_MD, expert_MK, gates_MK, load_GE.sum(0)).view(x.shape)


def cost_with_shared(d_model: int, expert: int, n_experts: int, top_k: int, n_shared: int) -> LayerCost:
    """The cost of `top_k` of `n_experts` routed experts and of shared ones, each of `expert` parameters."""
    router, shared = d_model * n_experts, n_shared * expert
    return LayerCost(
        params={"router": router, "experts": n_experts * expert, "shared_experts": shared},
        inactive=(n_experts - top_k) * expert,
        forward_flops={"router": 2 * router, "experts": 2 * top_k * expert, "shared_experts": 2 * shared},
    )
