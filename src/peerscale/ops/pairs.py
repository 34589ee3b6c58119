"""What a batch reads of a table, and the gradient of that table as factors.

Shapes: T tokens, D vector width, N rows of a table, J retrieved rows per token (heads x top_k), P = T J. A pair (t, j)
is a token t and its j-th retrieved row, rows[t, j].
"""

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from peerscale.ops.operators import Operators


@dataclass(frozen=True, slots=True)
class SortedPairs:
    """The pairs sorted by row; R different rows."""

    order_P: Tensor
    """Positions t J + j of the pairs, ascending within a row."""
    tokens_P: Tensor
    """Tokens t of the pairs."""
    starts_R: Tensor
    """Where the pairs of each row begin in `order_P`, and at the end the number of pairs. A backend may append rows
    without pairs for its own use."""


class Pairs:
    """The pairs of a batch. They are sorted by row on first use, once for all tables that are read with them.

    Raises:
        IndexError: a row is outside the table; known on a CPU only, since the check would have to wait for a GPU.
    """

    def __init__(self, operators: "Operators", rows_TJ: Tensor, n_rows: int) -> None:
        if rows_TJ.device.type == "cpu":
            check_rows(rows_TJ, n_rows)
        self.operators, self.rows_TJ, self.n_rows = operators, rows_TJ.long().contiguous(), n_rows

    @functools.cached_property
    def by_row(self) -> SortedPairs:
        return self.operators.sort_pairs(self)


@dataclass(frozen=True, slots=True)
class TableGradient:
    """The gradient of a table as factors, whose size depends on the batch but not on the table.

    Row n of the gradient is the sum of coefficients[t, j] vectors[t] over the pairs (t, j) of row n.
    """

    pairs: Pairs
    coefficients_TJ: Tensor
    vectors_TD: Tensor


def collect_row_gradients(table: nn.Parameter) -> None:
    """Make backward passes keep the gradient of `table` as factors, for a row-sparse optimiser, and leave `table.grad`
    unset. A copy of the table collects nothing.
    """
    table.collected_gradients = []  # type: ignore[attr-defined]


def collected_gradients(table: Tensor) -> list[TableGradient] | None:
    """The list to which every backward pass appends its gradient of `table`; None if it goes to `table.grad`."""
    return getattr(table, "collected_gradients", None)


def total_gradient(parts: list[TableGradient]) -> TableGradient | None:
    """The sum of collected gradients; None if there was no backward pass."""
    if len(parts) < 2:
        return parts[0] if parts else None
    first = parts[0].pairs
    return TableGradient(
        Pairs(first.operators, torch.cat([part.pairs.rows_TJ for part in parts]), first.n_rows),
        torch.cat([part.coefficients_TJ for part in parts]),
        torch.cat([part.vectors_TD for part in parts]),
    )


def check_rows(rows: Tensor, n_rows: int) -> None:
    """Raise `IndexError` if a row is outside a table of `n_rows`."""
    if rows.numel():
        lowest, highest = rows.aminmax()
        if lowest < 0 or highest >= n_rows:
            raise IndexError(f"rows {lowest}..{highest} of a table whose rows are 0..{n_rows - 1}")
