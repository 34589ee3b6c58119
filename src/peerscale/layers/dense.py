"""The dense feed-forward layer, a wider one, and a block without any."""

from typing import Any, Literal

from peerscale.config.types import Rate
from peerscale.layers.base import FfnConfig, LayerCost, Surroundings, layer_config, module_class
from peerscale.layers.registry import Layer


@layer_config
class DenseConfig(FfnConfig):
    """d_model -> 4 d_model -> d_model."""

    method: Literal["dense"] = "dense"
    initial_output_scale: Rate = 1.0
    """Multiplies the initial weights of the last matrix product. Smaller values imitate sparse layers, whose output is
    4 to 8 times smaller at the start."""

    def d_hidden(self, around: Surroundings) -> int:
        return around.d_ff

    def cost(self, around: Surroundings) -> LayerCost:
        weights = 2 * around.d_model * self.d_hidden(around)
        return LayerCost(params={"ffn": weights}, forward_flops={"ffn": 2 * weights})

    def saved_numbers(self, around: Surroundings) -> int:
        return 2 * around.d_model + 2 * self.d_hidden(around)

    def build(self, around: Surroundings) -> Any:
        return module_class("dense.Dense")(around.d_model, self.d_hidden(around), self.initial_output_scale)


@layer_config
class WideDenseConfig(DenseConfig):
    """A dense layer with as many parameters as a sparse one, all of them active: the upper bound of Dai et al. (2024,
    section 4)."""

    method: Literal["wide_dense"] = "wide_dense"  # pyrefly: ignore[bad-override]
    params_of: Layer
    """The sparse layer, with its settings."""

    def d_hidden(self, around: Surroundings) -> int:
        """The hidden width whose parameter count is nearest to the sparse layer's: off by less than d_model."""
        return round(sum(self.params_of.cost(around).params.values()) / (2 * around.d_model))


@layer_config
class NoLayerConfig(FfnConfig):
    """No feed-forward layer in the block: the control that shows what a layer is worth at equal compute."""

    method: Literal["no_layer"] = "no_layer"

    def cost(self, around: Surroundings) -> LayerCost:
        return LayerCost(params={}, forward_flops={})

    def saved_numbers(self, around: Surroundings) -> int:
        return around.d_model

    def build(self, around: Surroundings) -> Any:
        return module_class("dense.NoLayer")()
