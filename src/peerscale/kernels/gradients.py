"""Gradients of tables that are kept as factors (`TableGradient`), for a row-sparse optimiser or for other ranks."""

import torch
from torch import Tensor, nn

from peerscale.kernels.operators import Pairs, TableGradient


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
                    Pairs(parts[0].pairs.operators, rows_TJ, parts[0].pairs.n_rows),
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
