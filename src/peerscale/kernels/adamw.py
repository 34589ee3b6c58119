"""AdamW on some rows of a table, in plain torch: the definition.

A row that no token retrieved since the last step is left alone, and so are its two moments and its step count (lazy
moments). Hence the bias correction of a row counts the steps of that row: its first update has the size of the learning
rate, whenever it comes. Decay is decoupled and also applies to the retrieved rows only. Where every row is retrieved in
every step this is `torch.optim.AdamW`.
"""

from typing import Any

from torch import Tensor

State = dict[str, Tensor]
"""What AdamW remembers of a table: the moments `exp_avg` and `exp_avg_sq` (N, D), and the `step` of each row (N,)."""

Rates = dict[str, Any]
"""A parameter group, as `torch.optim.AdamW` has it: lr, betas, eps, weight_decay."""


def update_rows(table_ND: Tensor, state: State, rows_R: Tensor, gradient_RD: Tensor, rates: Rates) -> None:
    """One step for the rows `rows_R`, each named once, whose gradients are `gradient_RD`."""
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
