"""Fine-grained mixture of experts with shared experts, in the manner of DeepSeekMoE (Dai et al. 2024, section 3)."""

from torch import Tensor

from peerscale.model.dense import Dense
from peerscale.model.moe import TokenChoiceMoe


class FineGrainedMoe(TokenChoiceMoe):
    """f(x) = sum of the shared experts + sum over the top k routed experts of s_i(x) FFN_i(x) (equations 9 to 11).

    s is the softmax over all routed experts and is not normalised again over the top k. `auxiliary_loss` is as in
    `TokenChoiceMoe`, without the z loss: the paper's expert-level balance loss (equations 12 to 14).

    Args:
        d_model: width of input and output.
        d_expert: hidden width of every expert, a fraction of a dense layer's (equation 6).
        n_experts: routed experts.
        top_k: routed experts per token.
        n_shared: further experts, which every token uses.
        load_balance_weight: alpha_1 of equation 12.
    """

    def __init__(
        self,
        d_model: int,
        d_expert: int,
        n_experts: int,
        top_k: int,
        *,
        n_shared: int = 1,
        load_balance_weight: float = 0.0,
    ) -> None:
        super().__init__(d_model, d_expert, n_experts, top_k, load_balance_weight=load_balance_weight)
        # Experts without gates add up to one dense layer of their total width.
        self.shared = Dense(d_model, n_shared * d_expert)

    def init_weights(self, output_scale: float) -> None:
        super().init_weights(output_scale)
        self.shared.init_weights(output_scale)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> y (..., D)."""
        return self.shared(x) + super().forward(x)
