"""What every backend offers to the models; `reference` defines it.

Shapes: T tokens, D vector width, N rows of a table, J retrieved rows a token (heads x top_k); for product keys H heads,
S the 2 halves of a key, C half a key's width, N sub-keys a side, G key sets (1, shared by the heads, or H), K top_k.
A pair is a token t and a rank j, and stands for the row rows[t, j].
"""

import functools
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from peerscale.kernels.adamw import AdamW, Moments


@dataclass(frozen=True, slots=True)
class SortedPairs:
    """The pairs sorted by row, R rows in all."""

    order_P: Tensor
    """Positions t J + j of the pairs, in this order within a row."""
    tokens_P: Tensor
    """Their tokens t."""
    starts_R: Tensor
    """Where the pairs of each row begin in `order_P`; one number more, the end. For a backend's own use it may go on
    with rows without pairs."""


class Pairs:
    """The pairs of a batch, sorted by row at most once, when first needed, for all the tables that they read."""

    def __init__(self, operators: "Operators", rows_TJ: Tensor, n_rows: int) -> None:
        self.operators, self.rows_TJ, self.n_rows = operators, rows_TJ.long().contiguous(), n_rows

    @functools.cached_property
    def by_row(self) -> SortedPairs:
        return self.operators.sort_pairs(self)

    def quicker_by_row(self, vectors_TD: Tensor, table_ND: Tensor, cache_bytes: int) -> bool:
        """Whether to read each row of the table once, and the vectors many times, rather than the other way round."""
        reads_per_row = self.rows_TJ.numel() / self.n_rows
        return reads_per_row >= 2 and table_ND.nbytes > cache_bytes and table_ND.nbytes > 2 * vectors_TD.nbytes


@dataclass(frozen=True, slots=True)
class TableGradient:
    """The gradient of a table as factors whose size is that of the batch and does not grow with the table.

    It is, in row n, the sum over the pairs of n of coefficients[t, j] vectors[t].
    """

    pairs: Pairs
    coefficients_TJ: Tensor
    vectors_TD: Tensor


class Operators(Protocol):
    """A backend. The first six operators are differentiable in all floating-point arguments, unless said otherwise."""

    name: str
    """As `trainer.kernel` has it."""

    def obstacle(self, device: str) -> str | None:
        """Why the backend cannot run on this type of device here, in one line; None if it can."""

    def single_neuron_experts(
        self, x_TD: Tensor, w_down_ND: Tensor, w_up_ND: Tensor, rows_TJ: Tensor, gates_TJ: Tensor, activation: str
    ) -> Tensor:
        """y[t] = sum_j gates[t, j] sigma(<x[t], w_down[i]>) w_up[i], i = rows[t, j] (PEER, equations 6 and 7)."""

    def weighted_rows(self, table_ND: Tensor, rows_TJ: Tensor, weights_TJ: Tensor) -> Tensor:
        """y[t] = sum_j weights[t, j] table[rows[t, j]]: a product-key memory (Lample et al. 2019)."""

    def product_key_top_k(self, query_THSC: Tensor, sub_keys_GSNC: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """The best K sums of a first-side and a second-side score <query half, sub-key> of each token and head.

        Best first; equal ones in a fixed order. Scores and rows i N + j of the pairs (i, j), both (T, H, K).
        """

    def rms_norm(self, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """y = x / sqrt(mean(x^2) + eps) weight, over the last dimension (Zhang and Sennrich 2019)."""

    def rotary(self, qkv_BT3HC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
        """Queries and keys rotated by the angles of their positions, by halves (Su et al. 2021), beside the values.

        B sequences of T tokens; of each its query, key and value with H heads of width 2 C.
        """

    def cross_entropy_(self, logits_TV: Tensor, targets_T: Tensor, scale: float) -> Tensor:
        """-log softmax(logits[t])[targets[t]]; the logits become `scale` times its gradient. Not differentiable."""

    # What they and their gradients are made of, for contiguous tensors and without gradients.

    def row_dot_products(self, x_TD: Tensor, table_ND: Tensor, pairs: Pairs) -> Tensor:
        """s[t, j] = <x[t], table[rows[t, j]]>."""

    def weighted_row_sum(self, table_ND: Tensor, pairs: Pairs, weights_TJ: Tensor) -> Tensor:
        """y[t] = sum_j weights[t, j] table[rows[t, j]]."""

    def sort_pairs(self, pairs: Pairs) -> SortedPairs:
        """The pairs by row."""

    def table_gradient(self, gradient: TableGradient) -> Tensor:
        """The gradient (N, D) in full."""

    def adamw_rows(self, gradient: TableGradient, table_ND: Tensor, moments: Moments, adamw: AdamW) -> None:
        """`adamw.update_rows` for the rows that have pairs."""
