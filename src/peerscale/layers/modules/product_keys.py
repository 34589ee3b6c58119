"""Product-key memory (Lample et al. 2019) and PEER (He 2024), which retrieve rows of tables by product keys: they find
the exact top k of N keys at the cost of 2 sqrt(N) keys (PEER, section 2, equations 4 and 5).

Shapes: T tokens, D model width, H heads, S the 2 halves of a key, C half a key's width, K top_k, J = H K.
"""

from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peerscale.layers.product_keys import PeerConfig, PkmConfig, RetrievalConfig
from peerscale.model.usage import CountsUsage
from peerscale.ops.backends import choose_operators
from peerscale.ops.operators import Operators

EPS, MOMENTUM = 1e-5, 0.1
"""Of torch's BatchNorm."""


class GroupedBatchNorm(nn.Module):
    """BatchNorm separately over each of `n_groups` equal, consecutive parts of the input.

    The running statistics move towards the mean statistics of the groups, once per batch, that is, after every
    `n_passes` inputs in training. (Not a kind of torch's BatchNorm, which several devices would take their statistics
    of together.)
    """

    def __init__(self, n_features: int, n_groups: int, n_passes: int = 1) -> None:
        super().__init__()
        self.n_groups, self.n_passes = n_groups, n_passes
        self.weight, self.bias = nn.Parameter(torch.ones(n_features)), nn.Parameter(torch.zeros(n_features))
        self.running_mean = nn.Buffer(torch.zeros(n_features))
        self.running_var = nn.Buffer(torch.ones(n_features))
        self.num_batches_tracked = nn.Buffer(torch.zeros((), dtype=torch.long))
        self.passed_P2F = nn.Buffer(torch.zeros(n_passes, 2, n_features), persistent=False)
        self.n_passed = 0

    def forward(self, x: Tensor) -> Tensor:
        """x (T, features) -> y (T, features)."""
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=EPS)
        parts_GTF = x.unflatten(0, (self.n_groups, -1))
        n = parts_GTF.shape[1]
        mean_G1F = parts_GTF.sum(1, keepdim=True) / n
        centred_GTF = parts_GTF - mean_G1F
        variance_G1F = centred_GTF.square().sum(1, keepdim=True) / n
        with torch.no_grad():
            self.passed_P2F[self.n_passed % self.n_passes] = torch.stack(
                [mean_G1F.mean((0, 1)), variance_G1F.mean((0, 1)) * n / (n - 1)]
            )
            self.n_passed += 1
            if self.n_passed % self.n_passes == 0:
                self.num_batches_tracked.add_(1)
                new_mean_F, new_var_F = self.passed_P2F.mean(0)
                self.running_mean.lerp_(new_mean_F, MOMENTUM)
                self.running_var.lerp_(new_var_F, MOMENTUM)
        return (centred_GTF * (variance_G1F + EPS).rsqrt()).flatten(0, 1) * self.weight + self.bias


def query_norm(n_features: int, n_groups: int, n_passes: int) -> nn.Module:
    """The BatchNorm of queries: torch's own, unless a batch passes in several groups or parts."""
    if n_groups * n_passes == 1:
        return nn.BatchNorm1d(n_features)
    return GroupedBatchNorm(n_features, n_groups, n_passes)


class ProductKeyRetrieval(nn.Module, CountsUsage):
    """Queries, product keys and their top k; scores are always in fp32. Subclasses add tables of rows.

    Under autocast the rows are rounded to its type when they are read (`kernels.operators`); the gradients of the
    tables keep the type of the tables.

    Args:
        d_model: width of input and output.
        n_experts, n_heads, top_k, d_key, settings: see the settings class, `CONFIG`.
        n_groups: consecutive parts of the input, each with its own BatchNorm statistics.
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
        self.query_norm = query_norm(self.n_heads * d_key, n_groups, n_passes) if config.query_norm else None
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
