"""Product-key memory (Lample et al. 2019)."""

from typing import Any, ClassVar, Literal

from peerscale.layers.base import Surroundings, layer_config, module_class
from peerscale.layers.product_keys import RetrievalConfig


@layer_config
class PkmConfig(RetrievalConfig):
    """Product-key memory (Lample et al. 2019): retrieved values that do not depend on the input."""

    method: Literal["pkm"] = "pkm"

    ROWS_PER_EXPERT: ClassVar[int] = 1

    def build(self, around: Surroundings) -> Any:
        return module_class("pkm.Pkm")(
            around.d_model, n_groups=around.n_groups, operators=around.operators, **self.settings()
        )
