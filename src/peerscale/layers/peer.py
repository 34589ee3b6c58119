"""PEER: parameter-efficient expert retrieval (He 2024)."""

from typing import Any, ClassVar, Literal

from peerscale.layers.base import Surroundings, layer_config, module_class
from peerscale.layers.product_keys import RetrievalConfig


@layer_config
class PeerConfig(RetrievalConfig):
    """Parameter-efficient expert retrieval (He 2024): retrieved experts of one neuron each."""

    method: Literal["peer"] = "peer"
    activation: Literal["gelu", "relu"] = "gelu"
    """Not stated in the paper ("e.g. ReLU or GELU")."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """Over the retrieved experts of each head (paper, equation 2 and algorithm 1)."""

    ROWS_PER_EXPERT: ClassVar[int] = 2

    def build(self, around: Surroundings) -> Any:
        return module_class("peer.Peer")(
            around.d_model, n_groups=around.n_groups, operators=around.operators, **self.settings()
        )

    def columns(self, d_model: int) -> dict[str, Any]:
        return {**RetrievalConfig.columns(self, d_model), "granularity": self.active_experts}
