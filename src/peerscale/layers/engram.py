"""Engram (DeepSeek 2026): vectors of hashed n-grams, added to the residual stream before attention.

Shapes: B sequences, T tokens per sequence, D model width, J tables (hash functions of all orders), L tokens of the
longest n-gram, R width of a row, E = J R width of all rows of a token.
"""

from itertools import count, islice
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from peerscale.layers.base import FfnConfig, LayerCost, Place, Surroundings, layer_config
from peerscale.types import Positive


@layer_config
class EngramConfig(FfnConfig):
    """The settings; dense layers stay in all blocks."""

    method: Literal["engram"] = "engram"
    orders: Annotated[tuple[Positive, ...], Field(min_length=1)] = (2, 3)
    """Lengths of the n-grams, each of which ends with the current token."""
    n_hashes: Positive = 8
    """Hash functions, each with a table, for every order."""
    n_rows: Positive = 8192
    """Rows of a table, at least: their number is the next prime. 1: the control without memory, in which every n-gram
    has the same row."""
    d_row: Positive = 4
    """Width of a row."""
    kernel: Positive = 4
    """Width of the convolution, whose taps are `dilation` tokens apart."""
    dilation: Positive = 3

    @property
    def place(self) -> Place:
        return "before_attention"

    @property
    def table_orders(self) -> list[int]:
        """The length of the n-grams of each table."""
        return [order for order in self.orders for _ in range(self.n_hashes)]

    @property
    def table_rows(self) -> list[int]:
        """The number of rows of each table: different primes, as equal ones would repeat each other's collisions."""
        n_tables = len(self.table_orders)
        if self.n_rows == 1:
            return [1] * n_tables
        primes = (n for n in count(max(2, self.n_rows)) if all(n % d for d in range(2, int(n**0.5) + 1)))
        return [*islice(primes, n_tables)]

    def cost(self, around: Surroundings) -> LayerCost:
        d_model, d_memory = around.d_model, len(self.table_orders) * self.d_row
        table = sum(self.table_rows) * self.d_row
        projections, convolution = 2 * d_memory * d_model, self.kernel * d_model
        return LayerCost(
            params={"tables": table, "projections": projections, "convolution": convolution, "norms": 3 * d_model},
            inactive=table - d_memory,
            forward_flops={"projections": 2 * projections, "convolution": 2 * convolution},
        )

    def build(self, around: Surroundings) -> nn.Module:
        return Engram(around.d_model, self)

    def saved_numbers(self, around: Surroundings) -> int:
        return 2 * len(self.table_orders) * self.d_row + 8 * around.d_model

    def columns(self, d_model: int) -> dict[str, Any]:
        return {"n_experts": sum(self.table_rows), "active_experts": len(self.table_orders)}


class Engram(nn.Module):
    """y = u + silu(convolution(norm(u))), u = sigmoid(r(<norm(x), norm(W_k e)> / sqrt(D))) W_v e.

    e (E) has one row of each table: that of the hash of the last 2 or 3 tokens. r(z) = sign(z) sqrt(|z|), as in the
    paper's code. The convolution over earlier positions is by channel and starts at zero.

    A hash is the exclusive or of token id times an odd random number, modulo the rows. The paper draws these numbers
    once a layer, here every table has its own. Ids are hashed as they are: the paper first merges ids that differ in
    case or accents, of which 2,048 tokens have few. It states no initial weights of the tables; here the rows of a
    token have norm about 1 together. Tables are trained with `optim.table_lr`, not decayed (in the paper at 5 times the
    others' rate); width and number of rows are for our sizes.
    """

    takes_tokens = True

    def __init__(self, d_model: int, config: EngramConfig) -> None:
        super().__init__()
        rows, orders, d_memory = config.table_rows, config.table_orders, len(config.table_orders) * config.d_row
        self.table = nn.Parameter(torch.randn(sum(rows), config.d_row) * d_memory**-0.5)
        self.key, self.value = (nn.Linear(d_memory, d_model, bias=False) for _ in range(2))
        self.norm_x, self.norm_key, self.norm_value = (nn.RMSNorm(d_model) for _ in range(3))
        self.convolution = nn.Conv1d(
            d_model, d_model, config.kernel, groups=d_model, dilation=config.dilation, bias=False
        )
        self.past = (config.kernel - 1) * config.dilation
        # One factor for each table and lag, 0 beyond the table's order: products are below 2^63 for any vocabulary.
        factors_LJ = 2 * torch.randint(2**31, (max(orders), len(orders))) + 1
        reached_LJ = torch.arange(max(orders))[:, None] < torch.tensor(orders)
        self.register_buffer("factors_LJ", factors_LJ * reached_LJ)
        rows_J = torch.tensor(rows)
        self.register_buffer("rows_J", rows_J, persistent=False)
        self.register_buffer("first_row_J", rows_J.cumsum(0) - rows_J, persistent=False)
        self.factors_LJ: Tensor
        self.rows_J: Tensor
        self.first_row_J: Tensor

    def init_weights(self, output_scale: float) -> None:
        """Keep the tables; draw the projections with variance 1 / fan-in, unscaled; the convolution starts at zero."""
        for linear in (self.key, self.value):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        nn.init.zeros_(self.convolution.weight)

    def expert_tables(self) -> list[nn.Parameter]:
        """The rows of all tables, one table after the other."""
        return [self.table]

    def rows(self, tokens_BT: Tensor) -> Tensor:
        """The rows that each token retrieves (B, T, J). Tokens before the first count as id -1."""
        hash_BTJ = tokens_BT.new_zeros(())
        for lag, factor_J in enumerate(self.factors_LJ):
            earlier_BT = F.pad(tokens_BT, (lag, 0), value=-1)[:, : tokens_BT.shape[1]]
            hash_BTJ = hash_BTJ ^ ((earlier_BT + 1).unsqueeze(-1) * factor_J)
        return self.first_row_J + hash_BTJ % self.rows_J

    def forward(self, x_BTD: Tensor, tokens_BT: Tensor) -> Tensor:
        """x (B, T, D), tokens (B, T) -> y (B, T, D)."""
        memory_BTE = F.embedding(self.rows(tokens_BT), self.table).flatten(-2).to(x_BTD.dtype)
        match_BT1 = (self.norm_x(x_BTD) * self.norm_key(self.key(memory_BTE).to(x_BTD.dtype))).sum(-1, keepdim=True)
        match_BT1 = match_BT1 * x_BTD.shape[-1] ** -0.5
        root_BT1 = match_BT1.sign() * match_BT1.abs().clamp_min(1e-6).sqrt()  # whose slope at 0 is finite
        u_BTD = root_BT1.sigmoid() * self.value(memory_BTE)
        past_BDT = F.pad(self.norm_value(u_BTD).transpose(1, 2), (self.past, 0))
        return u_BTD + F.silu(self.convolution(past_BDT)).transpose(1, 2)
