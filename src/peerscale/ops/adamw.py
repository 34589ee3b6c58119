"""AdamW on some rows of a table, in plain torch: the definition that backends follow.

If no token retrieved a row since the last step, the row, its two moments and its step count do not change (lazy
moments). The bias correction of a row therefore counts the steps of that row: its first update has the size of the
learning rate, no matter when it happens. Weight decay is decoupled and also applies only to retrieved rows. If every
row is retrieved in every step, this is `torch.optim.AdamW`.
"""

from typing import Any

from torch import Tensor

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
