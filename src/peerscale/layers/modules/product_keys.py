"""Product-key retrieval: the exact top k of N keys at the cost of 2 sqrt(N) (PEER, section 2, equations 4 and 5).

Shapes: T tokens, D model width, H heads, S the 2 halves of a key, C half a key's width, K top_k.
"""

import torch
from torch import Tensor, nn

from peerscale.kernels.backends import operators_for
from peerscale.kernels.operators import Operators
from peerscale.layers.product_keys import RetrievalConfig
from peerscale.model.ranks import n_ranks, sum_over_ranks
from peerscale.model.sharded_tables import ShardedTables


class QueryNorm(nn.BatchNorm1d):
    """torch's BatchNorm over the batch of all ranks; torch's SyncBatchNorm does not run on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        """x (T, features) -> y (T, features)."""
        if not self.training or n_ranks() == 1:
            return super().forward(input)
        n = len(input) * n_ranks()
        mean = sum_over_ranks(input.sum(0)) / n
        centred = input - mean
        variance = sum_over_ranks(centred.square().sum(0)) / n
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        assert self.momentum is not None
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * n / (n - 1), self.momentum)
        return centred * (variance + self.eps).rsqrt() * self.weight + self.bias


class ProductKeyRetrieval(nn.Module):
    """Queries, product keys and their top k; scores in fp32 whatever the precision.

    Args:
        d_model: width of the input.
        config: the layer's settings.
        kernel: the implementation of the operators (`kernels.backends`).
    """

    def __init__(self, d_model: int, config: RetrievalConfig, kernel: str = "auto") -> None:
        super().__init__()
        self.config, self.kernel = config, kernel
        self.n_experts, self.n_heads, self.top_k = config.n_experts, config.n_heads, config.top_k
        self.sharded = False
        d_key = config.resolved_d_key(d_model)
        self.query = nn.Linear(d_model, self.n_heads * d_key, bias=config.query_bias)
        self.query_norm = QueryNorm(self.n_heads * d_key) if config.query_norm else None
        self.sub_keys = nn.Parameter(torch.empty(config.n_key_sets, 2, config.n_keys, d_key // 2))
        self.reset_parameters()

    @property
    def operators(self) -> Operators | ShardedTables:
        """The implementation, which depends on the device that the layer is on."""
        operators = operators_for(self.kernel, self.sub_keys.device.type)
        return ShardedTables(operators) if self.sharded else operators

    def reset_parameters(self) -> None:
        """The paper states no initialisation; this is that of the product-key memory code it refers to."""
        nn.init.xavier_uniform_(self.query.weight)
        if self.query.bias is not None:
            nn.init.zeros_(self.query.bias)
        bound = self.sub_keys.shape[-1] ** -0.5
        nn.init.uniform_(self.sub_keys, -bound, bound)

    def init_weights(self, output_scale: float) -> None:
        """Keep the draws of the constructor, tables included, unscaled: the papers state no scale of the output."""

    def retrieve(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (T, D) -> scores, best first, and row numbers, both (T, H, K)."""
        with torch.autocast(x.device.type, enabled=False):
            query = self.query(x.to(self.query.weight.dtype))
            if self.query_norm is not None:
                query = self.query_norm(query)
            query_THSC = query.view(len(x), self.n_heads, 2, self.sub_keys.shape[-1])
            return self.operators.product_key_top_k(query_THSC, self.sub_keys, self.top_k)
