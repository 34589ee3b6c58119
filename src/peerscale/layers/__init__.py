"""Feed-forward layers: what a study compares.

A layer is its settings, a subclass of `FfnConfig`, which say what it costs and build it. The settings of our layers are
the modules of this folder, and what they compute is in `modules`: two files for each, because planning, tables and
figures read only the settings, and importing torch takes them longer than all else. A layer of your own is one module
anywhere (README.md, Add a layer).
"""

from typing import TYPE_CHECKING, Any

from peerscale.layers.base import FfnConfig, LayerCost, Surroundings, layer_config, module_class

if TYPE_CHECKING:
    from peerscale.layers.modules.product_keys import Peer, Pkm

__all__ = ["FfnConfig", "LayerCost", "Peer", "Pkm", "Surroundings", "layer_config"]


def __getattr__(name: str) -> Any:
    """`Peer` and `Pkm`, imported when first asked for, since they import torch."""
    if name in ("Peer", "Pkm"):
        return module_class(f"product_keys.{name}")
    raise AttributeError(f"module {__name__} has no attribute {name}")
