"""Product-key memory (Lample et al. 2019) and PEER (He 2024), which retrieve rows of tables by product keys: they find
the exact top k of N keys at the cost of 2 sqrt(N) keys (PEER, section 2, equations 4 and 5).

Shapes: T tokens, D model width, H heads, S the 2 halves of a key, C half a key's width, K top_k, J = H K.
"""

from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from peerscale.layers.product_keys import PeerConfig, PkmConfig, RetrievalConfig
from peerscale.model.ranks import groups_here, mean_over_ranks, n_ranks, sum_over_ranks
from peerscale.model.usage import CountsUsage
from peerscale.ops.backends import choose_operators
from peerscale.ops.operators import Operators


class QueryNorm(nn.BatchNorm1d):
    """torch's BatchNorm over the input of all ranks, or separately over each of its `n_groups` consecutive parts.

    The running statistics move towards the mean statistics of the groups, once per batch, that is, after every
    `n_passes` inputs in training. (torch's SyncBatchNorm does not run on a CPU.)
    """

    def __init__(self, n_features: int, n_groups: int = 1, n_passes: int = 1) -> None:
        super().__init__(n_features)
        self.n_groups, self.n_passes = n_groups, n_passes
        # Kept in tensors, since torch.compile would recompile the layer for each new Python number.
        self.register_buffer("passed_P2F", torch.zeros(n_passes, 2, n_features), persistent=False)
        self.register_buffer("n_passed", torch.zeros((), dtype=torch.long), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """x (T, features) -> y (T, features)."""
        if not self.training or n_ranks() * self.n_groups * self.n_passes == 1:
            return super().forward(input)
        n = self._group_size(input)
        parts_GTF = input.unflatten(0, (groups_here(self.n_groups), -1))
        mean_G1F = self._sum(parts_GTF) / n
        centred_GTF = parts_GTF - mean_G1F
        variance_G1F = self._sum(centred_GTF.square()) / n
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        assert self.momentum is not None
        with torch.no_grad():
            here_2F = torch.stack([mean_G1F.mean((0, 1)), variance_G1F.mean((0, 1)) * n / (n - 1)])
            self.passed_P2F.copy_(torch.cat([self.passed_P2F[1:], here_2F[None]]))
            new_2F = mean_over_ranks(self.passed_P2F.mean(0))
            self.n_passed += 1
            ends = self.n_passed % self.n_passes == 0
            self.num_batches_tracked += ends
            for running_F, new_F in zip((self.running_mean, self.running_var), new_2F, strict=True):
                running_F.copy_(torch.where(ends, running_F.lerp(new_F, self.momentum), running_F))
        return (centred_GTF * (variance_G1F + self.eps).rsqrt()).flatten(0, 1) * self.weight + self.bias

    def _group_size(self, input: Tensor) -> Tensor | int:
        """Tokens in a group; in the layers of other people's models, ranks may have unequal numbers of them."""
        if self.n_groups == 1 and n_ranks() > 1:
            return sum_over_ranks(torch.full((), len(input), dtype=torch.float32, device=input.device))
        return len(input) * n_ranks() // self.n_groups

    def _sum(self, parts_GTF: Tensor) -> Tensor:
        """The sum over each group; a single group is spread over all ranks."""
        here_G1F = parts_GTF.sum(1, keepdim=True)
        return sum_over_ranks(here_G1F) if self.n_groups == 1 else here_G1F


class ProductKeyRetrieval(nn.Module, CountsUsage):
    """Queries, product keys and their top k; scores are always in fp32. Subclasses add tables of rows.

    Under autocast the rows are rounded to its type when they are read (`kernels.operators`); the gradients of the
    tables keep the type of the tables.

    Args:
        d_model: width of input and output.
        n_experts, n_heads, top_k, d_key, settings: see the settings class, `CONFIG`.
        n_groups: consecutive parts of the input, on all ranks, each with its own BatchNorm statistics.
        n_passes: inputs that make up a batch, after which the BatchNorm's running statistics move.
        operators: the backend; None: the fastest for the kind of device that the layer is on (`kernels.backends`).

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
        n_groups: int = 1,
        n_passes: int = 1,
        operators: Operators | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        config = self.CONFIG(n_experts=n_experts, n_heads=n_heads, top_k=top_k, d_key=d_key, **settings)
        self.config, self.n_experts, self.n_heads, self.top_k = config, n_experts, n_heads, top_k
        self.follows_device = operators is None
        self.operators = operators or choose_operators()
        d_key = config.resolved_d_key(d_model)
        self.query = nn.Linear(d_model, self.n_heads * d_key, bias=config.query_bias)
        self.query_norm = QueryNorm(self.n_heads * d_key, n_groups, n_passes) if config.query_norm else None
        self.sub_keys = nn.Parameter(torch.empty(config.n_key_sets, 2, config.n_keys, d_key // 2))
        self.reset_parameters()

    def _apply(self, *arguments: Any, **options: Any) -> Self:
        """Called by `to` and `cuda`: choose the operators again, since the fastest backend depends on the device."""
        super()._apply(*arguments, **options)
        if self.follows_device:
            self.operators = choose_operators(device=self.sub_keys.device.type)
        return self

    def reset_parameters(self) -> None:
        """The paper states no initialisation; this one is from the product-key memory code that it refers to."""
        nn.init.xavier_uniform_(self.query.weight)
        if self.query.bias is not None:
            nn.init.zeros_(self.query.bias)
        bound = self.sub_keys.shape[-1] ** -0.5
        nn.init.uniform_(self.sub_keys, -bound, bound)

    def init_weights(self, output_scale: float) -> None:
        """Keep the constructor's weights, including the tables, unscaled: the papers state no scale of the output."""

    def retrieve(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (T, D) -> scores, best first, and row numbers, both (T, H, K)."""
        with torch.autocast(x.device.type, enabled=False):
            query = self.query(x.to(self.query.weight.dtype))
            if self.query_norm is not None:
                query = self.query_norm(query)
            query_THSC = query.view(len(x), self.n_heads, 2, self.sub_keys.shape[-1])
            return self.operators.product_key_top_k(query_THSC, self.sub_keys, self.top_k)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> y (..., D)."""
        x_TD = x.reshape(-1, x.shape[-1])
        scores_THK, rows_THK = self.retrieve(x_TD)
        gates_THK = self.gates(scores_THK)
        if self.usage is not None:
            self.usage.add(rows_THK, gates_THK, len(x_TD))
        device, dtype = x.device.type, self.sub_keys.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            y_TD = self.combine(x_TD.to(dtype), rows_THK.flatten(1), gates_THK.flatten(1))
        return y_TD.view(x.shape).to(x.dtype)

    def gates(self, scores_THK: Tensor) -> Tensor:
        """The weights of the retrieved rows."""
        return scores_THK.softmax(dim=-1)

    def combine(self, x_TD: Tensor, rows_TJ: Tensor, gates_TJ: Tensor) -> Tensor:
        """The output (T, D) from the retrieved rows, which are read in the precision of x."""
        raise NotImplementedError

    def new_table(self, d_model: int) -> nn.Parameter:
        """A table with a row per expert, of norm about 1; the papers state no initialisation."""
        return nn.Parameter(torch.randn(self.n_experts, d_model) * d_model**-0.5)


class Pkm(ProductKeyRetrieval):
    """f(x) = sum over heads and their top k values of softmax_k(q . k_i) v_i; `values` is (n_experts, d_model).

    See `ProductKeyRetrieval` for the arguments, `PkmConfig` for the settings.
    """

    CONFIG = PkmConfig

    def __init__(self, d_model: int, *arguments: Any, **settings: Any) -> None:
        super().__init__(d_model, *arguments, **settings)
        self.values = self.new_table(d_model)

    def expert_tables(self) -> list[nn.Parameter]:
        """The parameters with a row an expert, which have a learning rate of their own."""
        return [self.values]

    def combine(self, x_TD: Tensor, rows_TJ: Tensor, gates_TJ: Tensor) -> Tensor:
        return self.operators.weighted_rows(self.values, rows_TJ, gates_TJ, x_TD.dtype)


class Peer(ProductKeyRetrieval):
    """f(x) = sum over heads and their top k experts of g_i(x) sigma(u_i . x) v_i (He 2024, section 2, algorithm 1).

    No bias, norm, dropout or output projection. `w_down` holds the u, `w_up` the v, both (n_experts, d_model).
    See `ProductKeyRetrieval` for the arguments, `PeerConfig` for the settings.
    """

    CONFIG = PeerConfig

    def __init__(self, d_model: int, *arguments: Any, **settings: Any) -> None:
        super().__init__(d_model, *arguments, **settings)
        assert isinstance(self.config, PeerConfig)
        self.activation, self.score = self.config.activation, self.config.score
        # With rows of norm about 1, u . x also has the variance of x's features.
        self.w_down, self.w_up = self.new_table(d_model), self.new_table(d_model)

    def expert_tables(self) -> list[nn.Parameter]:
        """The parameters with a row an expert, which have a learning rate of their own."""
        return [self.w_down, self.w_up]

    def gates(self, scores_THK: Tensor) -> Tensor:
        return super().gates(scores_THK) if self.score == "softmax" else scores_THK.sigmoid()

    def combine(self, x_TD: Tensor, rows_TJ: Tensor, gates_TJ: Tensor) -> Tensor:
        return self.operators.single_neuron_experts(x_TD, self.w_down, self.w_up, rows_TJ, gates_TJ, self.activation)
