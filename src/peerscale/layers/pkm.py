"""Product-key memory (Lample et al. 2019): retrieved values that do not depend on the input.

Shapes: T tokens, D model width, J retrieved values per token (heads x top_k).
"""

from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from peerscale.layers.base import Surroundings, layer_config
from peerscale.layers.product_keys import ProductKeyRetrieval, RetrievalConfig


@layer_config
class PkmConfig(RetrievalConfig):
    """The settings; those of `RetrievalConfig` are all there are."""

    method: Literal["pkm"] = "pkm"

    ROWS_PER_EXPERT: ClassVar[int] = 1

    def build(self, around: Surroundings) -> nn.Module:
        return Pkm(**self.arguments(around))


class Pkm(ProductKeyRetrieval):
    """f(x) = sum over heads and their top k values of softmax_k(q . k_i) v_i; `values` is (n_experts, d_model).

    See `ProductKeyRetrieval` for the arguments, `RetrievalConfig` for the settings.
    """

    CONFIG = PkmConfig

    def __init__(self, d_model: int, *arguments: Any, **settings: Any) -> None:
        super().__init__(d_model, *arguments, **settings)
        self.values = self.new_table(d_model)

    def expert_tables(self) -> list[nn.Parameter]:
        """The parameters with a row per value, which have a learning rate of their own."""
        return [self.values]

    def combine(self, x_TD: Tensor, rows_TJ: Tensor, gates_TJ: Tensor) -> Tensor:
        return self.operators.weighted_rows(self.values, rows_TJ, gates_TJ, x_TD.dtype)
