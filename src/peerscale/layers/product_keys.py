"""Retrieval by product keys, which finds the exact top k of N keys at the cost of 2 sqrt(N) keys: settings, cost and
weights that product-key memory (Lample et al. 2019) and PEER (He 2024, section 2, equations 4 and 5) share.

Shapes: T tokens, D model width, G groups of tokens, F width of all queries, H heads, S the 2 halves of a key, C half a
key's width, K top_k, J = H K.
"""

from dataclasses import fields
from math import isqrt
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from peerscale.layers.base import FfnConfig, LayerCost, Surroundings, layer_config
from peerscale.layers.groups import mean_over_devices, n_groups
from peerscale.layers.usage import CountsUsage
from peerscale.ops.backends import choose_operators
from peerscale.ops.operators import Operators
from peerscale.types import Positive


@layer_config
class RetrievalConfig(FfnConfig):
    """The settings of a layer that retrieves rows of tables; a subclass defines `ROWS_PER_EXPERT` and `build`."""

    n_experts: Positive
    n_heads: Positive
    top_k: Positive
    d_key: Literal["half_d_model"] | Positive = "half_d_model"
    """Query and key width per head, both halves together. Not stated in the paper; half_d_model is d_model / 2, rounded
    up to a multiple of 4 and at least 8, because a fixed 128 would cost small models more than the retrieved experts.
    """
    query_norm: bool = True
    """BatchNorm on the queries (paper, section 3.4)."""
    query_bias: bool = True
    """Not stated in the paper; on in the product-key memory code that the paper refers to."""
    shared_keys: bool = True
    """One set of product keys for all heads (paper, section 2), or one per head (the code that the paper refers to)."""

    SHARES_OF_PEAK = (0.21, 0.145)
    ROWS_PER_EXPERT: ClassVar[int]
    """Number of table rows, of d_model numbers each, per expert."""

    def __post_init__(self) -> None:
        side = isqrt(self.n_experts)
        if side * side != self.n_experts:
            raise ValueError(
                f"n_experts {self.n_experts} is not a square (product keys); nearest: {side**2}, {(side + 1) ** 2}"
            )
        if self.top_k > side:
            raise ValueError(f"top_k {self.top_k} is more than the {side} sub-keys of a side; allowed: 1..{side}")
        if self.d_key != "half_d_model" and self.d_key % 2:
            raise ValueError(f"d_key {self.d_key} is odd, but a key has two equal halves")

    @property
    def n_keys(self) -> int:
        """Sub-keys per side: sqrt(n_experts) (paper, equation 4)."""
        return isqrt(self.n_experts)

    @property
    def n_key_sets(self) -> int:
        """Number of sets of product keys: 1, or 1 per head."""
        return 1 if self.shared_keys else self.n_heads

    @property
    def active_experts(self) -> int:
        """Experts that one token retrieves."""
        return self.n_heads * self.top_k

    def resolved_d_key(self, d_model: int) -> int:
        """`d_key` for this model width; half_d_model is rounded up to a multiple of 4, so that halves are even."""
        return max(8, -(-d_model // 8) * 4) if self.d_key == "half_d_model" else self.d_key

    def cost(self, around: Surroundings) -> LayerCost:
        """The cost of product-key retrieval and of a weighted sum of table rows (paper, section 2)."""
        d_model, d_key, heads = around.d_model, self.resolved_d_key(around.d_model), self.n_heads
        expert = self.ROWS_PER_EXPERT * d_model
        params = {
            "query": heads * d_key * (d_model + self.query_bias),
            "sub_keys": self.n_key_sets * self.n_keys * d_key,
            "experts": self.n_experts * expert,
        }
        if self.query_norm:
            params["query_norm"] = 2 * heads * d_key
        return LayerCost(
            params=params,
            inactive=max(0, self.n_experts - self.active_experts) * expert,
            forward_flops={
                "query": 2 * d_model * heads * d_key,
                "sub_keys": 2 * heads * self.n_keys * d_key,
                "experts": 2 * self.active_experts * expert,
            },
        )

    def arguments(self, around: Surroundings) -> dict[str, Any]:
        """The arguments with which the layer is built."""
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("method", "variant")}
        grouped = around.n_groups * around.micro_batches > 1
        return {
            "d_model": around.d_model,
            "group_sequences": around.group_sequences if grouped else None,
            "micro_batches": around.micro_batches,
            "operators": around.operators,
            **settings,
        }

    def saved_numbers(self, around: Surroundings) -> int:
        queries = self.n_heads * self.resolved_d_key(around.d_model)  # counted twice below: before and after their norm
        return 2 * around.d_model + 2 * queries + 8 * self.active_experts

    def saved_in_fp32(self, around: Surroundings) -> int:
        return self.saved_numbers(around) - around.d_model  # retrieval is fp32

    def table_sizes(self, around: Surroundings) -> list[int]:
        return [self.n_experts * around.d_model] * self.ROWS_PER_EXPERT

    @property
    def takes_statistics(self) -> bool:
        return self.query_norm

    def columns(self, d_model: int) -> dict[str, Any]:
        return {
            "n_experts": self.n_experts,
            "ffn_heads": self.n_heads,
            "top_k": self.top_k,
            "d_key": self.resolved_d_key(d_model),
            "query_norm": self.query_norm,
            "active_experts": self.active_experts,
        }


class GroupedBatchNorm(nn.InstanceNorm1d):
    """BatchNorm of each group of tokens by itself: an instance norm, whose instances are the groups.

    The running statistics are the groups' mean. As with BatchNorm, they move by `momentum` a batch, which consists of
    `micro_batches` inputs here; each input moves them so far that all have the same weight in the end.
    """

    BATCH_MOMENTUM = 0.1

    def __init__(self, n_features: int, micro_batches: int = 1) -> None:
        super().__init__(n_features, affine=True, track_running_stats=True)
        self.micro_batches, self.n_inputs = micro_batches, 0

    def forward(self, input: Tensor) -> Tensor:
        """x (G, T, F) -> y (G, T, F)."""
        if self.training:
            to_come = self.micro_batches - 1 - self.n_inputs % self.micro_batches
            self.momentum = self.BATCH_MOMENTUM / (self.micro_batches - to_come * self.BATCH_MOMENTUM)
            self.n_inputs += 1
        y = super().forward(input.transpose(1, 2)).transpose(1, 2)
        if self.training:
            assert self.running_mean is not None and self.running_var is not None
            for running_F in (self.running_mean, self.running_var):
                running_F.copy_(mean_over_devices(running_F))
        return y


class ProductKeyRetrieval(nn.Module, CountsUsage):
    """Queries, product keys and their top k; scores are always in fp32. Subclasses add tables of rows.

    Under autocast the rows are rounded to its type when they are read (`ops.operators`); the gradients of the tables
    keep the type of the tables.

    Args:
        d_model: width of input and output.
        n_experts, n_heads, top_k, d_key, settings: see the settings class, `CONFIG`.
        group_sequences: the queries of so many sequences are normalised together; None: those of the whole input.
        micro_batches: inputs that make up a batch, with which the running statistics of groups move.
        operators: the backend; None: the fastest for the kind of device that the layer is on (`ops.backends`).

    Raises:
        ValueError: the settings are invalid.
    """

    CONFIG: ClassVar[type[RetrievalConfig]]

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        n_heads: int,
        top_k: int,
        d_key: int | Literal["half_d_model"] = "half_d_model",
        *,
        group_sequences: int | None = None,
        micro_batches: int = 1,
        operators: Operators | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        config = self.CONFIG(n_experts=n_experts, n_heads=n_heads, top_k=top_k, d_key=d_key, **settings)
        self.config, self.n_experts, self.n_heads, self.top_k = config, n_experts, n_heads, top_k
        self.follows_device = operators is None
        self.operators = operators or choose_operators()
        d_key, self.group_sequences = config.resolved_d_key(d_model), group_sequences
        self.query = nn.Linear(d_model, n_heads * d_key, bias=config.query_bias)
        self.query_norm = None
        if config.query_norm and group_sequences is None:
            self.query_norm = nn.BatchNorm1d(n_heads * d_key)
        elif config.query_norm:
            self.query_norm = GroupedBatchNorm(n_heads * d_key, micro_batches)
        self.sub_keys = nn.Parameter(torch.empty(config.n_key_sets, 2, config.n_keys, d_key // 2))
        # The paper states no initialisation; this one is from the product-key memory code that it refers to.
        nn.init.xavier_uniform_(self.query.weight)
        if self.query.bias is not None:
            nn.init.zeros_(self.query.bias)
        bound = self.sub_keys.shape[-1] ** -0.5
        nn.init.uniform_(self.sub_keys, -bound, bound)

    def new_table(self, d_model: int) -> nn.Parameter:
        """A table with a row per expert, of norm about 1; the papers state no initialisation."""
        return nn.Parameter(torch.randn(self.n_experts, d_model) * d_model**-0.5)

    def init_weights(self, output_scale: float) -> None:
        """Keep the constructor's weights, including the tables, unscaled: the papers state no scale of the output."""

    def _apply(self, *arguments: Any, **options: Any) -> Self:
        """Called by `to` and `cuda`: choose the operators again, since the fastest backend depends on the device."""
        super()._apply(*arguments, **options)
        if self.follows_device:
            self.operators = choose_operators(device=self.sub_keys.device.type)
        return self

    def retrieve(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (..., D) -> scores, best first, and row numbers, both (T, H, K)."""
        with torch.autocast(x.device.type, enabled=False):
            query_TF = self.query(x.reshape(-1, x.shape[-1]).to(self.query.weight.dtype))
            if isinstance(self.query_norm, GroupedBatchNorm):
                query_GTF = query_TF.unflatten(0, (n_groups(len(x), self.group_sequences), -1))
                query_TF = self.query_norm(query_GTF).flatten(0, 1)
            elif self.query_norm is not None:
                query_TF = self.query_norm(query_TF)
            query_THSC = query_TF.view(-1, self.n_heads, 2, self.sub_keys.shape[-1])
            return self.operators.product_key_top_k(query_THSC, self.sub_keys, self.top_k)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> y (..., D)."""
        scores_THK, rows_THK = self.retrieve(x)
        gates_THK = self.gates(scores_THK)
        if self.usage is not None:
            self.usage.add(rows_THK, gates_THK, len(gates_THK))
        device, dtype = x.device.type, self.sub_keys.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            x_TD = x.reshape(-1, x.shape[-1]).to(dtype)
            y_TD = self.combine(x_TD, rows_THK.flatten(1), gates_THK.flatten(1))
        return y_TD.view(x.shape).to(x.dtype)

    def gates(self, scores_THK: Tensor) -> Tensor:
        """The weights of the retrieved rows."""
        return scores_THK.softmax(dim=-1)

    def combine(self, x_TD: Tensor, rows_TJ: Tensor, gates_TJ: Tensor) -> Tensor:
        """The output (T, D) from the retrieved rows, which are read in the precision of x."""
        raise NotImplementedError
