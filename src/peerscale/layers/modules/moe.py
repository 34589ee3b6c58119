"""Mixtures of experts; every expert is a dense feed-forward layer, and all run as batched products.

Shapes: B sequences, T tokens per sequence, D model width, F hidden width, E experts, C tokens that an expert chooses
at each position (capacity), K top_k, M tokens of the whole batch, P pairs of a token and an expert.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peerscale.layers.modules.dense import Dense
from peerscale.layers.moe import FineGrainedMoeConfig, MoeConfig
from peerscale.model.usage import CountsUsage


class Experts(nn.Module):
    """E dense layers side by side, with initial weights of variance 1 / fan-in."""

    def __init__(self, n_experts: int, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(n_experts, d_model, d_ff) * d_model**-0.5)
        self.up = nn.Parameter(torch.randn(n_experts, d_ff, d_model) * d_ff**-0.5)

    def init_weights(self, output_scale: float) -> None:
        """Keep the constructor's weights; multiply those of the second matrix product by `output_scale`."""
        self.up.data *= output_scale

    def forward(self, x_ECD: Tensor) -> Tensor:
        """Apply each expert to its own rows; all experts have the same number of rows."""
        return F.gelu(x_ECD @ self.down) @ self.up

    def grouped(self, x_PD: Tensor, rows_E: Tensor) -> Tensor:
        """Apply each expert to its own rows, which are sorted by expert; `rows_E` has the number of rows per expert."""
        return _grouped_product(F.gelu(_grouped_product(x_PD, self.down, rows_E)), self.up, rows_E)


class RoutedExperts(nn.Module, CountsUsage):
    """Experts, and a router whose scores choose among them."""

    def __init__(self, d_model: int, d_expert: int, n_experts: int) -> None:
        super().__init__()
        self.n_experts = n_experts
        self.router = nn.Linear(d_model, n_experts, bias=False)
        self.experts = Experts(n_experts, d_model, d_expert)

    def init_weights(self, output_scale: float) -> None:
        """Variance 1 / fan-in; each expert's second product times `output_scale`."""
        nn.init.normal_(self.router.weight, std=self.router.in_features**-0.5)
        self.experts.init_weights(output_scale)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Softmax over the experts, and the scores; both are always in fp32."""
        with torch.autocast(x.device.type, enabled=False):
            scores = self.router(x.to(self.router.weight.dtype))
            return scores.softmax(dim=-1), scores


class ExpertChoiceMoe(RoutedExperts):
    """Every expert chooses its tokens (Zhou et al. 2022), so that all experts have equal work.

    Experts choose among the tokens at the same position in all sequences of a group (as in Krajewski et al. 2024), so
    that no sequence sees its own future. The output of a sequence depends on the others in its group.

    Args:
        n_groups: number of consecutive parts of the input, each of which is a group.

    Raises (forward):
        ValueError: if a group's sequences x capacity_factor / n_experts is not a whole number in 1..sequences.
    """

    def __init__(self, d_model: int, d_ff: int, config: MoeConfig, n_groups: int = 1) -> None:
        super().__init__(d_model, d_ff, config.n_experts)
        self.config, self.n_groups = config, n_groups

    def forward(self, x_BTD: Tensor) -> Tensor:
        """x (B, T, D) -> y (B, T, D)."""
        B, T, D = x_BTD.shape
        sequences = B // self.n_groups
        capacity = self.config.capacity(sequences)
        if capacity is None:
            raise ValueError(
                f"{sequences} sequences x {self.config.capacity_factor:g} / {self.n_experts} experts "
                f"is not a whole number in 1..{sequences}"
            )
        gates_BTE = self.route(x_BTD)[0]
        groups = self.n_groups
        gates_ETGC, place_ETGC = gates_BTE.permute(2, 1, 0).unflatten(-1, (groups, -1)).topk(capacity, dim=-1)
        if groups > 1:
            # Sorted by sequence, which fixes the order of the sums over an expert's tokens.
            place_ETGC, order_ETGC = place_ETGC.sort(dim=-1)
            gates_ETGC = gates_ETGC.gather(-1, order_ETGC)
        first_G1 = torch.arange(0, B, B // groups, device=x_BTD.device)[:, None]
        gates_ETC, sequence_ETC = gates_ETGC.flatten(-2), (place_ETGC + first_G1).flatten(-2)
        # Row of each chosen token in the batch as (B x T, D).
        token_EM = (sequence_ETC * T + torch.arange(T, device=x_BTD.device)[:, None]).flatten(1)
        if self.usage is not None:
            expert_ETC = torch.arange(self.n_experts, device=x_BTD.device)[:, None, None].expand_as(gates_ETC)
            self.usage.add(expert_ETC, gates_ETC, B * T)
        x_MD = x_BTD.reshape(B * T, D)
        x_EMD = x_MD.index_select(0, token_EM.flatten()).view(*token_EM.shape, D)
        y_EMD = self.experts(x_EMD) * gates_ETC.flatten(1).unsqueeze(-1).to(x_BTD.dtype)
        y_MD = torch.zeros_like(x_MD, dtype=y_EMD.dtype).index_add(0, token_EM.flatten(), y_EMD.flatten(0, 1))
        return y_MD.view(B, T, D)


class TokenChoiceMoe(RoutedExperts):
    """Every token chooses its top k experts; no token is dropped and the output does not depend on the batch.

    After a forward pass in training `auxiliary_loss` is the weighted sum of the load-balance loss, E sum_i f_i P_i with
    f_i the share of tokens and P_i the mean probability of expert i (Fedus et al. 2021), and the z loss,
    mean(logsumexp(scores)^2) (Zoph et al. 2022). f and P are computed per group of sequences; the loss is the mean over
    groups.

    Args:
        n_groups: number of consecutive parts of the input, each of which is a group.
    """

    def __init__(
        self, d_model: int, d_expert: int, config: MoeConfig | FineGrainedMoeConfig, n_groups: int = 1
    ) -> None:
        super().__init__(d_model, d_expert, config.n_experts)
        self.config, self.top_k, self.n_groups = config, config.top_k, n_groups
        self.z_loss_weight = config.z_loss_weight if isinstance(config, MoeConfig) else 0.0
        self.auxiliary_loss: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> y (..., D)."""
        x_MD = x.reshape(-1, x.shape[-1])
        probabilities_ME, scores_ME = self.route(x_MD)
        gates_MK, expert_MK = probabilities_ME.topk(self.top_k, dim=-1)
        expert_P = expert_MK.flatten()
        # Not `bincount`, which waits for the device to find the highest index.
        load_E = expert_P.new_zeros(self.n_experts).scatter_add_(0, expert_P, torch.ones_like(expert_P))
        if self.training:
            if self.n_groups == 1:
                share_E = load_E.to(probabilities_ME.dtype) / expert_MK.numel()
                balance = self.n_experts * (share_E * probabilities_ME.mean(0)).sum()
            else:
                balance = self._balance_of_groups(probabilities_ME, expert_MK)
            z_loss = scores_ME.logsumexp(-1).square().mean()
            self.auxiliary_loss = self.config.load_balance_weight * balance + self.z_loss_weight * z_loss
        if self.usage is not None:
            self.usage.add(expert_MK, gates_MK, len(x_MD))
        # Sorted by expert, so that the pairs of one expert are consecutive rows.
        order = expert_P.argsort(stable=True)
        x_PD = x_MD.unsqueeze(1).expand(-1, self.top_k, -1).reshape(-1, x.shape[-1])
        y_PD = self.experts.grouped(x_PD.index_select(0, order), load_E)
        y_MKD = torch.zeros_like(y_PD).index_copy(0, order, y_PD).view(*expert_MK.shape, x.shape[-1])
        return (y_MKD * gates_MK.unsqueeze(-1).to(x.dtype)).sum(1).view(x.shape)

    def _balance_of_groups(self, probabilities_ME: Tensor, expert_MK: Tensor) -> Tensor:
        """E sum_i f_i P_i, averaged over the groups, which all have the same number of tokens."""
        chosen_ME = F.one_hot(expert_MK, self.n_experts).sum(1).to(probabilities_ME.dtype) / self.top_k
        share_GE, mean_GE = (x.unflatten(0, (self.n_groups, -1)).mean(1) for x in (chosen_ME, probabilities_ME))
        return self.n_experts * (share_GE * mean_GE).sum(-1).mean()


class FineGrainedMoe(TokenChoiceMoe):
    """f(x) = sum of the shared experts + sum over the top k routed experts of s_i(x) FFN_i(x), as in DeepSeekMoE (Dai
    et al. 2024, equations 9 to 11).

    s is the softmax over all routed experts and is not normalised again over the top k. `auxiliary_loss` is as in
    `TokenChoiceMoe`, without the z loss: the paper's expert-level balance loss (equations 12 to 14).
    """

    def __init__(self, d_model: int, d_ff: int, config: FineGrainedMoeConfig, n_groups: int = 1) -> None:
        d_expert = config.d_expert(d_ff)
        super().__init__(d_model, d_expert, config, n_groups)
        # The sum of experts without gates is one dense layer of their total width.
        self.shared = Dense(d_model, config.n_shared * d_expert)

    def init_weights(self, output_scale: float) -> None:
        super().init_weights(output_scale)
        self.shared.init_weights(output_scale)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> y (..., D)."""
        return self.shared(x) + super().forward(x)


def _grouped_product(x_PD: Tensor, weight_EDF: Tensor, rows_E: Tensor) -> Tensor:
    """The first rows_E[0] rows times weight_EDF[0], the next rows_E[1] times weight_EDF[1], and so on: (P, F)."""
    if torch.is_autocast_enabled(x_PD.device.type):  # autocast does not cover grouped products
        dtype = torch.get_autocast_dtype(x_PD.device.type)
        x_PD, weight_EDF = x_PD.to(dtype), weight_EDF.to(dtype)
    if _groups(x_PD, *weight_EDF.shape[1:]):
        return F.grouped_mm(x_PD, weight_EDF, offs=rows_E.cumsum(0, dtype=torch.int32))
    return torch.cat([x @ weight for x, weight in zip(x_PD.split(rows_E.tolist()), weight_EDF, strict=True)])


def _groups(x_PD: Tensor, *widths: int) -> bool:
    """Whether torch supports this grouped product: since 2.10, not in float64, rows of a multiple of 16 bytes."""
    aligned = all(width * x_PD.element_size() % 16 == 0 for width in widths)
    return hasattr(F, "grouped_mm") and x_PD.dtype != torch.float64 and aligned
