"""Engram (DeepSeek 2026): vectors of hashed n-grams, added to the residual stream before attention.

Shapes: B sequences, T tokens per sequence, D model width, N orders of n-grams, H hash functions of an order, R width of
a row, E = N H R width of all rows of a token.
"""

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from peerscale.layers.base import FfnConfig, LayerCost, Surroundings, layer_config
from peerscale.types import Positive


@layer_config
class EngramConfig(FfnConfig):
    """The settings; dense layers stay in all blocks."""

    method: Literal["engram"] = "engram"
    orders: Annotated[tuple[Positive, ...], Field(min_length=1)] = (2, 3)
    """Lengths of the n-grams, each of which ends with the current token."""
    n_hashes: Positive = 8
    """Hash functions, each with a table, for every order."""
    n_rows: Positive = 1024
    """Rows of a table, at least: their number is the next prime. 1: the control without memory, in which every n-gram
    has the same row."""
    d_row: Positive = 4
    """Width of a row."""
    kernel: Positive = 4
    """Width of the convolution, whose taps are `dilation` tokens apart."""
    dilation: Positive = 3

    @property
    def place(self) -> Literal["feed_forward", "before_attention"]:
        return "before_attention"

    @property
    def d_memory(self) -> int:
        """E, the width of all rows of a token."""
        return len(self.orders) * self.n_hashes * self.d_row

    @property
    def table_rows(self) -> list[int]:
        """The number of rows of each table: different primes, as equal ones would repeat each other's collisions."""
        if self.n_rows == 1:
            return [1] * (len(self.orders) * self.n_hashes)
        return primes(self.n_rows, len(self.orders) * self.n_hashes)

    def cost(self, around: Surroundings) -> LayerCost:
        d_model, tables = around.d_model, len(self.table_rows)
        table = sum(self.table_rows) * self.d_row
        products = 2 * self.d_memory * d_model
        return LayerCost(
            params={
                "tables": table,
                "projections": products,
                "convolution": self.kernel * d_model,
                "norms": 3 * d_model,
            },
            inactive=table - tables * self.d_row,
            forward_flops={"projections": 2 * products, "convolution": 2 * self.kernel * d_model},
        )

    def build(self, around: Surroundings) -> nn.Module:
        return Engram(around.d_model, self)

    def saved_numbers(self, around: Surroundings) -> int:
        return 2 * self.d_memory + 8 * around.d_model

    def columns(self, d_model: int) -> dict[str, Any]:
        return {"n_experts": sum(self.table_rows), "active_experts": len(self.table_rows)}


class Engram(nn.Module):
    """y = u + silu(convolution(norm(u))), u = sigmoid(r(<norm(x), norm(W_k e)> / sqrt(D))) W_v e.

    e (E) has one row of each table: that of the hash of the last 2 or 3 tokens. r(z) = sign(z) sqrt(|z|), as in the
    paper's code. The convolution over earlier positions is by channel and starts at zero. Token ids are hashed as they
    are: the paper first merges ids that differ in case or accents, which 2,048 tokens hardly have. The paper states no
    initial weights of the tables; here rows have norm about 1 together. Tables are trained with `optim.table_lr`.
    """

    takes_tokens = True

    def __init__(self, d_model: int, config: EngramConfig) -> None:
        super().__init__()
        self.orders, self.n_hashes, self.dilation = config.orders, config.n_hashes, config.dilation
        self.tables = nn.ParameterList(
            nn.Parameter(torch.randn(rows, config.d_row) * config.d_memory**-0.5) for rows in config.table_rows
        )
        self.key = nn.Linear(config.d_memory, d_model, bias=False)
        self.value = nn.Linear(config.d_memory, d_model, bias=False)
        self.norm_x, self.norm_key, self.norm_value = (nn.RMSNorm(d_model) for _ in range(3))
        self.convolution = nn.Conv1d(
            d_model, d_model, config.kernel, groups=d_model, dilation=config.dilation, bias=False
        )
        self.past = (config.kernel - 1) * config.dilation
        multipliers = torch.randint(1, 2**31, (len(config.table_rows), max(config.orders)))
        self.register_buffer("multipliers", 2 * multipliers + 1)
        self.multipliers: Tensor

    def init_weights(self, output_scale: float) -> None:
        """Keep the tables; draw the projections with variance 1 / fan-in; the convolution starts at zero."""
        for linear in (self.key, self.value):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        nn.init.zeros_(self.convolution.weight)

    def expert_tables(self) -> list[nn.Parameter]:
        """The parameters with a row per hash, which have a learning rate of their own."""
        return [*self.tables]

    def rows(self, tokens_BT: Tensor) -> list[Tensor]:
        """The row of each table at every token, (B, T) each: the exclusive or of id x multiplier, modulo the rows.

        Tokens before the first count as id -1.
        """
        earlier_LBT = [
            F.pad(tokens_BT, (lag, 0), value=-1)[:, : tokens_BT.shape[1]] + 1 for lag in range(max(self.orders))
        ]
        found = []
        for i, table in enumerate(self.tables):
            hashed_BT = torch.zeros_like(tokens_BT)
            for lag in range(self.orders[i // self.n_hashes]):
                hashed_BT = hashed_BT ^ (earlier_LBT[lag] * self.multipliers[i, lag])
            found.append(hashed_BT % len(table))
        return found

    def forward(self, x_BTD: Tensor, tokens_BT: Tensor) -> Tensor:
        """x (B, T, D), tokens (B, T) -> y (B, T, D)."""
        rows = zip(self.tables, self.rows(tokens_BT), strict=True)
        memory_BTE = torch.cat([F.embedding(rows_BT, table) for table, rows_BT in rows], dim=-1).to(x_BTD.dtype)
        match_BT1 = (self.norm_x(x_BTD) * self.norm_key(self.key(memory_BTE))).sum(-1, keepdim=True)
        match_BT1 = match_BT1 * x_BTD.shape[-1] ** -0.5
        root_BT1 = match_BT1.sign() * match_BT1.abs().clamp_min(1e-6).sqrt()
        u_BTD = root_BT1.sigmoid() * self.value(memory_BTE)
        past_BDT = F.pad(self.norm_value(u_BTD).transpose(1, 2), (self.past, 0))
        return u_BTD + F.silu(self.convolution(past_BDT)).transpose(1, 2)


def primes(at_least: int, n: int) -> list[int]:
    """The first n primes from `at_least` on."""
    found: list[int] = []
    number = at_least
    while len(found) < n:
        if number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1)):
            found.append(number)
        number += 1
    return found
