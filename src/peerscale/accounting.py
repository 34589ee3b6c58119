"""Parameters and FLOPs per token of a model, from its configuration alone.

Convention (`CONVENTION`): 2 FLOPs per multiply-add of every matrix product, attention scores in full (no causal
halving), backward = 2 x forward. Embedding look-ups, norms, activations, softmax and top-k are not counted. Every
component stands on its own, so that another convention is arithmetic on the table (Hoffmann et al. 2022, appendix F,
counts the same products; 6N leaves out attention scores).
"""

from dataclasses import dataclass

from peerscale.config import Config
from peerscale.layers.dense import DenseConfig

CONVENTION = "per-operation, full attention, backward 2x"

TRAINING = 3
"""Training FLOPs over forward FLOPs: one forward pass, and a backward pass of two."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """A whole model."""

    params: dict[str, int]
    """Parameters by group; the tied output head is the embedding."""
    params_active: int
    """Parameters that one token uses."""
    flops: dict[str, int]
    """Training FLOPs per token by component."""
    layer_flops: int
    """Training FLOPs per token of the replaced layers."""

    @property
    def params_total(self) -> int:
        return sum(self.params.values())

    @property
    def params_non_embedding(self) -> int:
        return self.params_total - self.params["embedding"]

    @property
    def flops_per_token(self) -> int:
        return sum(self.flops.values())

    @property
    def layer_share(self) -> float:
        """Share of the replaced layers in the training FLOPs."""
        return self.layer_flops / self.flops_per_token


STATE_BYTES = 16
"""Of a parameter: weight, gradient and two moments, in fp32."""
LOGITS_BYTES = 2**30
"""Of the slices of logits, and of their gradients, that a GPU holds at once (`kernels.cross_entropy`)."""


def device_memory(config: Config) -> dict[str, int]:
    """Bytes that training takes on one device, by what for; an estimate, without the allocator's losses.

    `state` are `STATE_BYTES` a parameter and, at precision bf16, 2 of a copy for each that an expert table has.
    `activations` are what one micro-batch keeps for its backward pass: of a block 9 d_model numbers per token, and what
    its feed-forward layer says of itself (`saved_numbers`). The `reference` kernel keeps more of PKM and PEER. With
    activation checkpointing it keeps the inputs of attention and dense layers, and for a moment all of one block.
    """
    around, bytes_each = config.surroundings, 2 if config.precision == "bf16" else 4
    d_model, n_layers = config.size.d_model, config.size.n_layers
    layer, dense = config.ffn.saved_numbers(around), DenseConfig().saved_numbers(around)
    n_replaced = len(config.replaced_blocks)
    numbers = n_layers * 9 * d_model + n_replaced * layer + (n_layers - n_replaced) * dense
    if config.trainer.activation_checkpointing:
        n_kept = 0 if config.ffn.method == "dense" else n_replaced  # layers that are not computed again
        numbers = n_layers * 2 * d_model + n_kept * (layer + d_model) + 9 * d_model + dense
    n_copied = n_replaced * config.ffn.copied_parameters(around) if config.precision == "bf16" else 0
    tokens = config.tokens_per_step // config.trainer.devices // around.micro_batches
    return {
        "state": STATE_BYTES * cost(config).params_total + 2 * n_copied,
        "activations": tokens * bytes_each * numbers,
        "logits": LOGITS_BYTES,
    }


def recomputed_share(config: Config, cost: Cost) -> float:
    """FLOPs that activation checkpointing adds to those of training: attention's and dense layers' forward pass."""
    if not config.trainer.activation_checkpointing:
        return 0.0
    kept = cost.flops["logits"] + (0 if config.ffn.method == "dense" else cost.layer_flops)
    return (cost.flops_per_token - kept) / TRAINING / cost.flops_per_token


def cost(config: Config) -> Cost:
    """Parameters and training FLOPs per token; equal to the built model's, as a test asserts."""
    d, n_layers = config.size.d_model, config.size.n_layers
    layer, n_replaced = config.ffn.cost(config.surroundings), len(config.replaced_blocks)
    dense, n_dense = DenseConfig().cost(config.surroundings), n_layers - n_replaced
    params = {
        "embedding": config.data.vocab_size * d,
        "attention": n_layers * 4 * d * d,
        "norms": (2 * n_layers + 1) * d,
        "ffn": n_dense * dense.params["ffn"],
    }
    forward = {
        "qkv": n_layers * 2 * 3 * d * d,
        "attention_scores": n_layers * 2 * config.context * d,
        "attention_values": n_layers * 2 * config.context * d,
        "attention_out": n_layers * 2 * d * d,
        "ffn": n_dense * dense.forward_flops["ffn"],
        "logits": 2 * config.data.vocab_size * d,
    }
    for group, n in layer.params.items():
        params[group] = params.get(group, 0) + n_replaced * n
    for component, n in layer.forward_flops.items():
        forward[component] = forward.get(component, 0) + n_replaced * n
    return Cost(
        params=params,
        params_active=sum(params.values()) - n_replaced * layer.inactive,
        flops={component: TRAINING * n for component, n in forward.items()},
        layer_flops=TRAINING * n_replaced * sum(layer.forward_flops.values()),
    )
