"""Parameters and FLOPs per token of a model, from its configuration alone.

Convention (`CONVENTION`): 2 FLOPs per multiply-add of every matrix product, attention scores in full (no causal
halving), backward = 2 x forward. Embedding look-ups, norms, activations, softmax and top-k are not counted. Every
component stands on its own, so that another convention is arithmetic on the table (Hoffmann et al. 2022, appendix F,
counts the same products; 6N leaves out attention scores).
"""

from dataclasses import dataclass, replace
from typing import assert_never

from peerscale.config import (
    Config,
    DenseConfig,
    FineGrainedMoeConfig,
    MoeConfig,
    PeerConfig,
    PkmConfig,
    RetrievalConfig,
    WideDenseConfig,
)

CONVENTION = "per-operation, full attention, backward 2x"

TRAINING = 3
"""Training FLOPs over forward FLOPs: one forward pass, and a backward pass of two."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCost:
    """One feed-forward layer of the kind under study."""

    params: dict[str, int]
    """Parameters by group."""
    inactive: int
    """Parameters that a token does not use (of expert choice: on average)."""
    forward_flops: dict[str, int]
    """Forward FLOPs per token by component."""


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


def cost(config: Config) -> Cost:
    """Parameters and training FLOPs per token; equal to the built model's, as a test asserts."""
    d, n_layers = config.size.d_model, config.size.n_layers
    layer, n_replaced = ffn_cost(config), len(config.replaced_blocks)
    dense, n_dense = 2 * d * config.size.d_ff, n_layers - n_replaced
    params = {
        "embedding": config.data.vocab_size * d,
        "attention": n_layers * 4 * d * d,
        "norms": (2 * n_layers + 1) * d,
        "ffn": n_dense * dense,
    }
    forward = {
        "qkv": n_layers * 2 * 3 * d * d,
        "attention_scores": n_layers * 2 * config.context * d,
        "attention_values": n_layers * 2 * config.context * d,
        "attention_out": n_layers * 2 * d * d,
        "ffn": n_dense * 2 * dense,
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


def ffn_cost(config: Config) -> LayerCost:
    """Parameters and forward FLOPs per token of one layer of the kind under study."""
    d, ffn = config.size.d_model, config.ffn
    dense = 2 * d * config.size.d_ff
    match ffn:
        case DenseConfig():
            return LayerCost(params={"ffn": dense}, inactive=0, forward_flops={"ffn": 2 * dense})
        case WideDenseConfig():
            wide = 2 * d * wide_d_ff(config, ffn)
            return LayerCost(params={"ffn": wide}, inactive=0, forward_flops={"ffn": 2 * wide})
        case MoeConfig():
            active = _active_experts(ffn, config.batch_sequences)
            return LayerCost(
                params={"router": d * ffn.n_experts, "experts": ffn.n_experts * dense},
                inactive=round((ffn.n_experts - active) * dense),
                forward_flops={"router": 2 * d * ffn.n_experts, "experts": round(2 * active * dense)},
            )
        case FineGrainedMoeConfig():
            router, expert = d * ffn.n_experts, 2 * d * ffn.d_expert(config.size.d_ff)
            return LayerCost(
                params={"router": router, "experts": ffn.n_experts * expert, "shared_experts": ffn.n_shared * expert},
                inactive=(ffn.n_experts - ffn.top_k) * expert,
                forward_flops={
                    "router": 2 * router,
                    "experts": 2 * ffn.top_k * expert,
                    "shared_experts": 2 * ffn.n_shared * expert,
                },
            )
        case PkmConfig():
            return _retrieval_cost(ffn, d, rows_per_expert=1)
        case PeerConfig():
            return _retrieval_cost(ffn, d, rows_per_expert=2)
        case _:
            assert_never(ffn)


def wide_d_ff(config: Config, ffn: WideDenseConfig) -> int:
    """Hidden width of the dense layer of equal parameters, the nearest: off by less than d_model of them."""
    params = sum(ffn_cost(replace(config, ffn=ffn.params_of)).params.values())
    return round(params / (2 * config.size.d_model))


def expert_choice_capacity(batch_sequences: int, capacity_factor: float, n_experts: int) -> int | None:
    """Tokens that an expert takes of a group, the tokens at one position of a batch.

    None if that is no whole number, less than one, or more than the group has.
    """
    capacity = batch_sequences * capacity_factor / n_experts
    whole = round(capacity)
    return whole if abs(capacity - whole) < 1e-9 * capacity and 1 <= whole <= batch_sequences else None


def _active_experts(ffn: MoeConfig, batch_sequences: int) -> float:
    """Experts per token, on average."""
    match ffn.routing:
        case "token_choice":
            return ffn.top_k
        case "expert_choice":
            capacity = expert_choice_capacity(batch_sequences, ffn.capacity_factor, ffn.n_experts)
            return ffn.capacity_factor if capacity is None else capacity * ffn.n_experts / batch_sequences


def _retrieval_cost(ffn: RetrievalConfig, d_model: int, *, rows_per_expert: int) -> LayerCost:
    """Product-key retrieval and a sum of `rows_per_expert` table rows of d_model an expert (paper, section 2)."""
    d_key, heads = ffn.resolved_d_key(d_model), ffn.n_heads
    row = rows_per_expert * d_model
    n_key_sets = 1 if ffn.shared_keys else heads
    params = {
        "query": heads * d_key * (d_model + ffn.query_bias),
        "sub_keys": n_key_sets * ffn.n_keys * d_key,
        "experts": ffn.n_experts * row,
    }
    if ffn.query_norm:
        params["query_norm"] = 2 * heads * d_key
    return LayerCost(
        params=params,
        inactive=max(0, ffn.n_experts - heads * ffn.top_k) * row,
        forward_flops={
            "query": 2 * d_model * heads * d_key,
            "sub_keys": 2 * heads * ffn.n_keys * d_key,
            "experts": 2 * heads * ffn.top_k * row,
        },
    )
