"""AdamW that updates only the retrieved rows of a table, so its cost does not grow with the number of experts.

If no token retrieved a row since the last step, the row, its two moments and its step count do not change (lazy
moments). The bias correction of a row therefore counts the steps of that row: its first update has the size of the
learning rate, no matter when it happens. Weight decay is decoupled and also applies only to retrieved rows. If every
row is retrieved in every step, this is `torch.optim.AdamW`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peerscale.ops.pairs import collect_row_gradients, collected_gradients, total_gradient

State = dict[str, Tensor]
"""AdamW's state for a table: the moments `exp_avg` and `exp_avg_sq` (N, D), and the `step` of each row (N,)."""

Rates = dict[str, Any]
"""A parameter group as in `torch.optim.AdamW`: lr, betas, eps, weight_decay."""


def update_rows(table_ND: Tensor, state: State, rows_R: Tensor, gradient_RD: Tensor, rates: Rates) -> None:
    """One step for the distinct rows `rows_R`, whose gradients are `gradient_RD`."""
    beta1, beta2 = rates["betas"]
    mean_ND, square_ND, steps_N = state["exp_avg"], state["exp_avg_sq"], state["step"]
    steps_R = steps_N[rows_R] + 1
    mean_RD = mean_ND[rows_R].lerp(gradient_RD, 1 - beta1)
    square_RD = square_ND[rows_R].lerp(gradient_RD.square(), 1 - beta2)
    steps_N[rows_R], mean_ND[rows_R], square_ND[rows_R] = steps_R, mean_RD, square_RD
    unbiased_mean = mean_RD / (1 - beta1 ** steps_R[:, None])
    unbiased_square = square_RD / (1 - beta2 ** steps_R[:, None])
    kept = table_ND[rows_R] * (1 - rates["lr"] * rates["weight_decay"])
    table_ND[rows_R] = kept - rates["lr"] * unbiased_mean / (unbiased_square.sqrt() + rates["eps"])


class RowSparseAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` that updates parameter groups marked `row_sparse: True` row by row.

    The parameters of a marked group are tables, (rows, width). Once they are added to the optimiser, the backward
    passes of `peerscale.ops` collect their gradients in compact form and leave `grad` at `None`. Gradients of
    several backward passes add up until `zero_grad` clears them. If other operators set a dense `grad`, the two
    are added, and the rows where the sum is not all zero are updated. The arguments are the same as torch's.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As for any optimiser; tables of a `row_sparse` group collect their gradients from now on."""
        param_group.setdefault("row_sparse", False)
        super().add_param_group(param_group)
        if param_group["row_sparse"]:
            for table in param_group["params"]:
                collect_row_gradients(table)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients, including collected ones."""
        super().zero_grad(set_to_none)
        for table, _ in self._tables():
            if collected := collected_gradients(table):
                collected.clear()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyrefly: ignore[bad-override]
        """One step of all groups; `closure`, if given, computes the gradients and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        tables = self._tables()
        for table, group in tables:
            self._step_table(table, group)
        # Hidden from AdamW, which skips parameters without a gradient.
        gradients = [table.grad for table, _ in tables]
        for table, _ in tables:
            table.grad = None
        super().step()
        for (table, _), gradient in zip(tables, gradients, strict=True):
            table.grad = gradient
        return loss

    def _tables(self) -> list[tuple[Tensor, dict[str, Any]]]:
        return [(table, group) for group in self.param_groups if group["row_sparse"] for table in group["params"]]

    def _step_table(self, table: Tensor, group: dict[str, Any]) -> None:
        gradient, dense = total_gradient(collected_gradients(table) or []), table.grad
        if gradient is None and dense is None:
            return
        state = self.state[table]
        if not state:
            state["step"] = table.new_zeros(len(table))
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(table), torch.zeros_like(table)
        if gradient is not None and dense is None:
            gradient.pairs.operators.adamw_rows(gradient, table, state, group)
        elif dense is not None:
            if gradient is not None:
                dense = dense + gradient.pairs.operators.table_gradient(gradient)
            rows = dense.any(dim=1).nonzero().squeeze(1)
            update_rows(table, state, rows, dense[rows], group)
