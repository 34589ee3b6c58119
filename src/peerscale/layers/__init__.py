"""Feed-forward layers, which a study compares. One module is one layer: settings, cost, weights and forward pass.

`base` says what a layer must define; `registry` finds ours by name, and others by the path of their class (README.md,
Add a layer). Nothing here imports configurations, plans or training, so that the layers serve other models as well.
"""

from typing import Any

from peerscale.layers.base import FfnConfig, LayerCost, OwnTraining, Place, Surroundings, layer_config

__all__ = ["FfnConfig", "LayerCost", "OwnTraining", "Peer", "Pkm", "Place", "Surroundings", "layer_config"]


def __getattr__(name: str) -> Any:
    """`Peer` and `Pkm`, imported on first use, since a study's file is read without torch."""
    if name == "Peer":
        from peerscale.layers.peer import Peer as layer
    elif name == "Pkm":
        from peerscale.layers.pkm import Pkm as layer
    else:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return layer
