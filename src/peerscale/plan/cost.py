"""Parameters and FLOPs per token of a model, from its configuration alone.

Convention (`CONVENTION`): 2 FLOPs per multiply-add of every matrix product, attention scores in full (no causal
halving), backward = 2 x forward. Embedding look-ups, norms, activations, softmax and top-k are not counted. Components
are reported separately, so that costs under another convention can be computed from the table (Hoffmann et al. 2022,
appendix F, counts the same products; 6N leaves out attention scores).
"""

from dataclasses import dataclass

from peerscale.config.schema import Config

CONVENTION = "per-operation, full attention, backward 2x"

TRAINING = 3
"""Training FLOPs over forward FLOPs: the backward pass costs two forward passes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Parameters and FLOPs per token of a whole model."""

    params: dict[str, int]
    """Parameters by group; the output head is tied to the embedding and not counted again."""
    params_active: int
    """Parameters that one token uses; shared ones count in each block that uses them."""
    flops: dict[str, int]
    """Training FLOPs per token by component."""
    layer_flops: int
    """Training FLOPs per token of the replaced layers."""

    @property
    def params_total(self) -> int:
        return sum(self.params.values())

    @property
    def flops_per_token(self) -> int:
        return sum(self.flops.values())

    @property
    def layer_share(self) -> float:
        """Share of the replaced layers in the training FLOPs."""
        return self.layer_flops / self.flops_per_token


def cost(config: Config) -> Cost:
    """Parameters and training FLOPs per token; a test compares them with the built model."""
    d, n_layers = config.d_model, config.n_layers
    layer, n_replaced = config.ffn.cost(config.surroundings), len(config.replaced_blocks)
    dense = config.dense_layer.cost(config.surroundings)
    params = {
        "embedding": config.data.vocab_size * d,
        "attention": n_layers * 4 * d * d,
        "norms": (2 * n_layers + 1) * d,
        "ffn": config.n_dense * dense.params["ffn"],
    }
    forward = {
        "qkv": n_layers * 2 * 3 * d * d,
        "attention_scores": n_layers * 2 * config.context * d,
        "attention_values": n_layers * 2 * config.context * d,
        "attention_out": n_layers * 2 * d * d,
        "ffn": config.n_dense * dense.forward_flops["ffn"],
        "logits": 2 * config.data.vocab_size * d,
    }
    for group, n in layer.params.items():
        params[group] = params.get(group, 0) + n_replaced * n - (n_replaced - 1) * layer.shared.get(group, 0)
    for component, n in layer.forward_flops.items():
        forward[component] = forward.get(component, 0) + n_replaced * n
    used_again = (n_replaced - 1) * sum(layer.shared.values())
    return Cost(
        params=params,
        params_active=sum(params.values()) + used_again - n_replaced * layer.inactive,
        flops={component: TRAINING * n for component, n in forward.items()},
        layer_flops=TRAINING * n_replaced * sum(layer.forward_flops.values()),
    )
