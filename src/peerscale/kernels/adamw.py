"""AdamW on some rows of a table, in plain torch: the definition.

A row that no token retrieved since the last step is left alone, and so are its two moments and its step count (lazy
moments). Hence the bias correction of a row counts the steps of that row: its first update has the size of the learning
rate, whenever it comes. Decay is decoupled and also applies to the retrieved rows only. Where every row is retrieved in
every step this is `torch.optim.AdamW`.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamW:
    """The rates of one step."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Moments:
    """What AdamW remembers of a table (N, D): both moments (N, D) and the steps of each row (N,)."""

    mean_ND: Tensor
    square_ND: Tensor
    steps_N: Tensor


def update_rows(table_ND: Tensor, moments: Moments, rows_R: Tensor, gradient_RD: Tensor, adamw: AdamW) -> None:
    """One step for the rows `rows_R`, each named once, whose gradients are `gradient_RD`."""
    steps_R = moments.steps_N[rows_R] + 1
    mean_RD = moments.mean_ND[rows_R].lerp(gradient_RD, 1 - adamw.beta1)
    square_RD = moments.square_ND[rows_R].lerp(gradient_RD.square(), 1 - adamw.beta2)
    moments.steps_N[rows_R], moments.mean_ND[rows_R], moments.square_ND[rows_R] = steps_R, mean_RD, square_RD
    unbiased_mean = mean_RD / (1 - adamw.beta1 ** steps_R[:, None])
    unbiased_square = square_RD / (1 - adamw.beta2 ** steps_R[:, None])
    kept = table_ND[rows_R] * (1 - adamw.lr * adamw.weight_decay)
    table_ND[rows_R] = kept - adamw.lr * unbiased_mean / (unbiased_square.sqrt() + adamw.eps)
