"""Fine-grained mixture of experts with shared experts, in the manner of DeepSeekMoE (Dai et al. 2024, section 3)."""

from torch import Tensor

from peerscale.layers.fine_grained_moe import FineGrainedMoeConfig
from peerscale.layers.modules.dense import Dense
from peerscale.layers.modules.moe import TokenChoiceMoe


class FineGrainedMoe(TokenChoiceMoe):
    """f(x) = sum of the shared experts + sum over the top k routed experts of s_i(x) FFN_i(x) (equations 9 to 11).

    s is the softmax over all routed experts and is not normalised again over the top k. `auxiliary_loss` is as in
    `TokenChoiceMoe`, without the z loss: the paper's expert-level balance loss (equations 12 to 14).
    """

    def __init__(self, d_model: int, d_ff: int, config: FineGrainedMoeConfig) -> None:
        d_expert = config.d_expert(d_ff)
        super().__init__(d_model, d_expert, config)
        # Experts without gates add up to one dense layer of their total width.
        self.shared = Dense(d_model, config.n_shared * d_expert)

    def init_weights(self, output_scale: float) -> None:
        super().init_weights(output_scale)
        self.shared.init_weights(output_scale)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> y (..., D)."""
        return self.shared(x) + super().forward(x)
