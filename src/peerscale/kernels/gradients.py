"""The gradients of the retrieved-row operators, once for every backend, and their form for a row-sparse optimiser.

Shapes: T tokens, D vector width, N rows of a table, J retrieved rows a token. A pair is a token t and a rank j, and
stands for the row rows[t, j].

The gradient of a table is, in row n, the sum over the pairs of n of coefficients[t, j] vectors[t]. It is either formed,
(N, D), for any optimiser; or, for a table that `collect_row_gradients` was called on, left as these factors, whose size
is that of the batch and does not grow with the table.
"""

import functools
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from peerscale.kernels.adamw import AdamW, Moments


@dataclass(frozen=True, slots=True)
class Runs:
    """The pairs sorted by row, R rows in all."""

    order_P: Tensor
    """Positions t J + j of the pairs, in this order within a row."""
    tokens_P: Tensor
    """Their tokens t."""
    starts_R: Tensor
    """Where the pairs of each row begin in `order_P`; one number more, the end. For a backend's own use it may go on
    with empty runs."""


class Arithmetic(Protocol):
    """What a backend computes, without gradients; all tensors are contiguous."""

    def row_scores(self, x_TD: Tensor, table_ND: Tensor, pairs: "Pairs") -> Tensor:
        """s[t, j] = <x[t], table[rows[t, j]]>."""

    def row_bags(self, table_ND: Tensor, pairs: "Pairs", weights_TJ: Tensor) -> Tensor:
        """y[t] = sum_j weights[t, j] table[rows[t, j]]."""

    def sort_pairs(self, rows_TJ: Tensor, n_rows: int) -> Runs:
        """The pairs by row."""

    def table_gradient(self, gradient: "TableGradient", n_rows: int) -> Tensor:
        """The gradient (N, D) in full."""

    def adamw_rows(self, gradient: "TableGradient", table_ND: Tensor, moments: Moments, adamw: AdamW) -> None:
        """`adamw.update_rows` for the rows that have pairs."""


class Pairs:
    """The pairs of a batch, sorted by row at most once, when first needed, for all the tables that they read."""

    def __init__(self, backend: Arithmetic, rows_TJ: Tensor, n_rows: int) -> None:
        self.backend, self.rows_TJ, self.n_rows = backend, rows_TJ.long().contiguous(), n_rows

    @functools.cached_property
    def runs(self) -> Runs:
        return self.backend.sort_pairs(self.rows_TJ, self.n_rows)


@dataclass(frozen=True, slots=True)
class TableGradient:
    """The factors of a table's gradient: coefficients (T, J) and vectors (T, D)."""

    pairs: Pairs
    coefficients_TJ: Tensor
    vectors_TD: Tensor


class CollectedGradients:
    """What the backward passes since the last `clear` left for a table: one `TableGradient` each."""

    def __init__(self) -> None:
        self.gradients: list[TableGradient] = []

    def clear(self) -> None:
        self.gradients = []

    def total(self) -> TableGradient | None:
        """Their sum; `None` if there was no backward pass."""
        if len(self.gradients) > 1:
            parts = self.gradients
            rows_TJ = torch.cat([part.pairs.rows_TJ for part in parts])
            self.gradients = [
                TableGradient(
                    Pairs(parts[0].pairs.backend, rows_TJ, parts[0].pairs.n_rows),
                    torch.cat([part.coefficients_TJ for part in parts]),
                    torch.cat([part.vectors_TD for part in parts]),
                )
            ]
        return self.gradients[0] if self.gradients else None


def collect_row_gradients(table: nn.Parameter, collect: bool = True) -> None:
    """Let backward passes keep the gradient of `table` as factors, and leave `table.grad` alone; or end that."""
    table.collected_gradients = CollectedGradients() if collect else None  # type: ignore[attr-defined]


def collected_gradients(table: Tensor) -> CollectedGradients | None:
    """Where the gradients of `table` go, if not into `table.grad`."""
    return getattr(table, "collected_gradients", None)


def _deliver(collected: CollectedGradients | None, gradient: TableGradient) -> Tensor | None:
    """The gradient for autograd, or, where it is collected, none."""
    if collected is None:
        return gradient.pairs.backend.table_gradient(gradient, gradient.pairs.n_rows)
    collected.gradients.append(gradient)
    return None


def row_scores(x_TD: Tensor, table_ND: Tensor, pairs: Pairs) -> Tensor:
    """s[t, j] = <x[t], table[rows[t, j]]>, differentiable."""
    return _Retrieval.apply(x_TD, table_ND, pairs, collected_gradients(table_ND), True)


def row_bags(table_ND: Tensor, pairs: Pairs, weights_TJ: Tensor) -> Tensor:
    """y[t] = sum_j weights[t, j] table[rows[t, j]], differentiable."""
    return _Retrieval.apply(weights_TJ, table_ND, pairs, collected_gradients(table_ND), False)


class _Retrieval(torch.autograd.Function):
    """`row_scores` of a factor (T, D) or `row_bags` of one (T, J): as functions of it, each is the other's adjoint."""

    @staticmethod
    def forward(
        ctx: Any, factor: Tensor, table_ND: Tensor, pairs: Pairs, collected: CollectedGradients | None, scores: bool
    ) -> Tensor:
        factor, table_ND = factor.contiguous(), table_ND.contiguous()
        ctx.save_for_backward(factor, table_ND)
        ctx.pairs, ctx.collected, ctx.scores = pairs, collected, scores
        return _retrieve(factor, table_ND, pairs, scores=scores)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        factor, table_ND = ctx.saved_tensors
        grad = grads[0].contiguous()
        needs_factor, needs_table, *_ = ctx.needs_input_grad
        coefficients_TJ, vectors_TD = (grad, factor) if ctx.scores else (factor, grad)
        grad_factor = _retrieve(grad, table_ND, ctx.pairs, scores=not ctx.scores) if needs_factor else None
        gradient = TableGradient(ctx.pairs, coefficients_TJ, vectors_TD)
        grad_table = _deliver(ctx.collected, gradient) if needs_table else None
        return grad_factor, grad_table, None, None, None


def _retrieve(factor: Tensor, table_ND: Tensor, pairs: Pairs, *, scores: bool) -> Tensor:
    backend = pairs.backend
    return backend.row_scores(factor, table_ND, pairs) if scores else backend.row_bags(table_ND, pairs, factor)
