"""Expert usage and unevenness by the paper's definitions (section 3.3)."""

import torch
from torch import Tensor


class CountsUsage:
    """A layer with experts that adds every forward pass to `usage`, if that is set."""

    n_experts: int
    usage: "ExpertUsage | None" = None


class ExpertUsage:
    """Sums of router weights by expert: z'_i = sum over tokens of g_i(x), 0 where i was not retrieved."""

    def __init__(self, n_experts: int) -> None:
        self.weight_sums = torch.zeros(n_experts, dtype=torch.float64)
        self.tokens = 0
        """Number of tokens counted."""

    def add(self, experts: Tensor, weights: Tensor, tokens: int) -> None:
        """Add `weights` of `experts`, two tensors of one shape, from a pass over `tokens` tokens."""
        self.weight_sums = self.weight_sums.to(weights.device)
        self.weight_sums.index_add_(0, experts.reshape(-1), weights.detach().reshape(-1).double())
        self.tokens += tokens

    @property
    def usage(self) -> float:
        """Share of the experts whose sum is not zero."""
        return float((self.weight_sums != 0).double().mean())

    @property
    def unevenness(self) -> float:
        """KL(z || uniform) in nats, z = z' / ||z'||_1; 0 is even, log(n_experts) is collapse onto one."""
        z = self.weight_sums.abs() / self.weight_sums.abs().sum()
        return float(torch.xlogy(z, z * len(z)).sum())
