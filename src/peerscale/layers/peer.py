"""Parameter-efficient expert retrieval, PEER (He 2024): retrieved experts of one neuron each.

Shapes: T tokens, D model width, H heads, K top_k, J = H K retrieved experts per token.
"""

from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from peerscale.layers.base import Surroundings, layer_config
from peerscale.layers.product_keys import ProductKeyRetrieval, RetrievalConfig


@layer_config
class PeerConfig(RetrievalConfig):
    """The settings, beside those of `RetrievalConfig`."""

    method: Literal["peer"] = "peer"
    activation: Literal["gelu", "relu"] = "gelu"
    """Not stated in the paper ("e.g. ReLU or GELU")."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """Applied over the retrieved experts of each head (paper, equation 2 and algorithm 1)."""

    ROWS_PER_EXPERT: ClassVar[int] = 2

    def build(self, around: Surroundings) -> nn.Module:
        return Peer(**self.arguments(around))

    def columns(self, d_model: int) -> dict[str, Any]:
        return {**RetrievalConfig.columns(self, d_model), "granularity": self.active_experts}


class Peer(ProductKeyRetrieval):
    """f(x) = sum over heads and their top k experts of g_i(x) sigma(u_i . x) v_i (He 2024, section 2, algorithm 1).

    No bias, norm, dropout or output projection. `w_down` holds the u, `w_up` the v, both (n_experts, d_model).
    See `ProductKeyRetrieval` for the arguments, `PeerConfig` and `RetrievalConfig` for the settings.
    """

    CONFIG = PeerConfig

    def __init__(self, d_model: int, *arguments: Any, **settings: Any) -> None:
        super().__init__(d_model, *arguments, **settings)
        assert isinstance(self.config, PeerConfig)
        self.activation, self.score = self.config.activation, self.config.score
        # With rows of norm about 1, u . x also has the variance of x's features.
        self.w_down, self.w_up = self.new_table(d_model), self.new_table(d_model)

    def expert_tables(self) -> list[nn.Parameter]:
        """The parameters with a row per expert, which have a learning rate of their own."""
        return [self.w_down, self.w_up]

    def gates(self, scores_THK: Tensor) -> Tensor:
        return super().gates(scores_THK) if self.score == "softmax" else scores_THK.sigmoid()

    def combine(self, x_TD: Tensor, rows_TJ: Tensor, gates_TJ: Tensor) -> Tensor:
        return self.operators.single_neuron_experts(x_TD, self.w_down, self.w_up, rows_TJ, gates_TJ, self.activation)
