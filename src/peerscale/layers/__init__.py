"""Feed-forward layers, which a study compares.

A layer is defined by its settings, a subclass of `FfnConfig` that states its cost and builds it. The modules of this
folder have the settings of our layers; `modules` has their weights and forward passes. They are separate because
planning, tables and figures need only the settings, and importing torch would take longer than everything else that
they do. A layer of your own is one module anywhere (README.md, Add a layer).
"""

from typing import TYPE_CHECKING, Any

from peerscale.layers.base import FfnConfig, LayerCost, Surroundings, layer_config, module_class

if TYPE_CHECKING:
    from peerscale.layers.modules.product_keys import Peer, Pkm

__all__ = ["FfnConfig", "LayerCost", "Peer", "Pkm", "Surroundings", "layer_config"]


def __getattr__(name: str) -> Any:
    """`Peer` and `Pkm`, imported on first use, since they import torch."""
    if name in ("Peer", "Pkm"):
        return module_class(f"product_keys.{name}")
    raise AttributeError(f"module {__name__} has no attribute {name}")
