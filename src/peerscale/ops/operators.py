"""The operators that every backend provides to the models, defined in plain torch (this definition stores every
gathered row).

Shapes: T tokens, D vector width, N rows of a table, J retrieved rows per token (heads x top_k); for product keys H
heads, S the 2 halves of a key, C half a key's width, N sub-keys per side, G key sets (1, shared by the heads, or H), K
top_k. A pair (t, j) is a token t and its j-th retrieved row, rows[t, j].

If vectors have lower precision than a table, such as bf16 and fp32, rows are rounded to the vectors' precision when
they are read. All products and sums, tensors with a number per pair, and the gradient of the table stay in the table's
precision; the output and the gradient of the vectors are rounded to the precision of the vectors.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peerscale.ops.adamw import Rates, State, update_rows

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu}
"""Activations of a single-neuron expert."""


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
    """The pairs of a batch. They are sorted by row on first use, once for all tables that are read with them."""

    def __init__(self, operators: "Operators", rows_TJ: Tensor, n_rows: int) -> None:
        self.operators, self.rows_TJ, self.n_rows = operators, rows_TJ.long().contiguous(), n_rows

    @functools.cached_property
    def by_row(self) -> SortedPairs:
        return self.operators.sort_pairs(self)

    def quicker_by_row(self, vectors_TD: Tensor, table_ND: Tensor, cache_bytes: int) -> bool:
        """Whether it is faster to read each row once and the vectors many times than the other way round."""
        reads_per_row = self.rows_TJ.numel() / self.n_rows
        return reads_per_row >= 2 and table_ND.nbytes > cache_bytes and table_ND.nbytes > 2 * vectors_TD.nbytes


@dataclass(frozen=True, slots=True)
class TableGradient:
    """The gradient of a table as factors, whose size depends on the batch but not on the table.

    Row n of the gradient is the sum of coefficients[t, j] vectors[t] over the pairs (t, j) of row n.
    """

    pairs: Pairs
    coefficients_TJ: Tensor
    vectors_TD: Tensor


class _Collected(list[TableGradient]):
    """A list that can have weak references, unlike a plain list."""


NUMBERED: WeakValueDictionary[int, _Collected] = WeakValueDictionary()
"""The lists of collected gradients by number; operators of `torch.library` take the number instead of the list."""
_numbers = itertools.count(1)


def collect_row_gradients(table: nn.Parameter) -> None:
    """Make backward passes keep the gradient of `table` as factors and not set `table.grad`; for a row-sparse optimiser
    or for the exchange between ranks.
    """
    table.collected_number = next(_numbers)  # type: ignore[attr-defined]
    table.collected_gradients = NUMBERED[table.collected_number] = _Collected()  # type: ignore[attr-defined]


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


class Operators:
    """A backend; this one is the definition. The first five operators are differentiable in all floating-point
    arguments."""

    name = "reference"
    """The backend's name in `trainer.kernel`."""

    def obstacle(self, device: str) -> str | None:
        """One line on why the backend cannot run on this type of device on this machine; None if it can."""
        return None

    def single_neuron_experts(
        self, x_TD: Tensor, w_down_ND: Tensor, w_up_ND: Tensor, rows_TJ: Tensor, gates_TJ: Tensor, activation: str
    ) -> Tensor:
        """y[t] = sum_j gates[t, j] sigma(<x[t], w_down[i]>) w_up[i], i = rows[t, j] (PEER, equations 6 and 7)."""
        w_down_TJD = _rounded(w_down_ND[rows_TJ], x_TD.dtype)
        hidden_TJ = ACTIVATIONS[activation](torch.einsum("td,tjd->tj", x_TD.to(w_down_ND.dtype), w_down_TJD))
        return self.weighted_rows(w_up_ND, rows_TJ, hidden_TJ * gates_TJ, x_TD.dtype)

    def weighted_rows(
        self, table_ND: Tensor, rows_TJ: Tensor, weights_TJ: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        """y[t] = sum_j weights[t, j] table[rows[t, j]]: a product-key memory (Lample et al. 2019).

        `dtype` is the type of y and the precision to which rows are rounded; None: the table's.
        """
        dtype = dtype or table_ND.dtype
        return torch.einsum("tj,tjd->td", weights_TJ, _rounded(table_ND[rows_TJ], dtype)).to(dtype)

    def product_key_top_k(self, query_THSC: Tensor, sub_keys_GSNC: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """For each token and head the K largest sums of a first-side and a second-side score <query half, sub-key>.

        Returns the scores and the rows i N + j of the sub-key pairs (i, j), both (T, H, K), best first, equal ones in a
        fixed order. The search follows PEER, section 2, equations 4 and 5.
        """
        n_keys = sub_keys_GSNC.shape[2]
        first, second = (torch.tensor(ranks, device=query_THSC.device) for ranks in candidate_pairs(top_k))
        best, sub_key = _sub_key_scores(query_THSC, sub_keys_GSNC).topk(top_k, dim=-1)
        candidates = best[0][..., first] + best[1][..., second]
        scores, position = candidates.topk(top_k, dim=-1)
        rows = sub_key[0].gather(-1, first[position]) * n_keys
        return scores, rows + sub_key[1].gather(-1, second[position])

    def rms_norm(self, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """y = x / sqrt(mean(x^2) + eps) weight, over the last dimension (Zhang and Sennrich 2019)."""
        return F.rms_norm(x, weight_D.shape, weight_D, eps)

    def rotary(self, qkv_BT3HC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
        """Rotate queries and keys by the angles of their positions (Su et al. 2021); values stay as they are.

        B sequences of T tokens; each token has a query, key and value with H heads of width 2 C, whose two halves are
        rotated against each other.
        """
        cos_T11C, sin_T11C = (table[: qkv_BT3HC.shape[1], None, None] for table in (cos_TC, sin_TC))
        first, second = qkv_BT3HC[:, :, :2].chunk(2, dim=-1)
        rotated = (first * cos_T11C - second * sin_T11C, second * cos_T11C + first * sin_T11C)
        return torch.cat([torch.cat(rotated, dim=-1).to(qkv_BT3HC.dtype), qkv_BT3HC[:, :, 2:]], dim=2)

    def cross_entropy_(self, logits_TV: Tensor, targets_T: Tensor, scale: float) -> Tensor:
        """-log softmax(logits[t])[targets[t]]; overwrites the logits with `scale` times its gradient. Not
        differentiable."""
        targets_T1 = targets_T.unsqueeze(1)
        log_probabilities_TV = logits_TV.log_softmax(dim=-1)
        torch.exp(log_probabilities_TV, out=logits_TV)
        logits_TV.scatter_add_(1, targets_T1, logits_TV.new_full(targets_T1.shape, -1.0)).mul_(scale)
        return -log_probabilities_TV.gather(1, targets_T1).squeeze(1)

    # The parts from which other backends build the operators and their gradients; contiguous tensors, no autograd.

    def row_dot_products(self, x_TD: Tensor, table_ND: Tensor, pairs: Pairs) -> Tensor:
        """s[t, j] = <x[t], table[rows[t, j]]>."""
        return torch.einsum("td,tjd->tj", x_TD, table_ND[pairs.rows_TJ])

    def weighted_row_sum(self, table_ND: Tensor, pairs: Pairs, weights_TJ: Tensor) -> Tensor:
        """y[t] = sum_j weights[t, j] table[rows[t, j]]."""
        return torch.einsum("tj,tjd->td", weights_TJ, table_ND[pairs.rows_TJ])

    def sort_pairs(self, pairs: Pairs) -> SortedPairs:
        """The pairs sorted by row."""
        rows, order = pairs.rows_TJ.view(-1).sort(stable=True)
        _, counts = rows.unique_consecutive(return_counts=True)
        return SortedPairs(order, order // pairs.rows_TJ.shape[1], F.pad(counts.cumsum(0), (1, 0)))

    def table_gradient(self, gradient: TableGradient) -> Tensor:
        """The full gradient (N, D)."""
        pairs, vectors_TD = gradient.pairs, gradient.vectors_TD
        parts_TJD = torch.einsum("tj,td->tjd", gradient.coefficients_TJ, vectors_TD)
        table_ND = vectors_TD.new_zeros(pairs.n_rows, vectors_TD.shape[1])
        return table_ND.index_add(0, pairs.rows_TJ.view(-1), parts_TJD.flatten(0, 1))

    def adamw_rows(self, gradient: TableGradient, table_ND: Tensor, state: State, rates: Rates) -> None:
        """Apply `adamw.update_rows` to the rows that have pairs."""
        rows_R = gradient.pairs.rows_TJ.unique()
        update_rows(table_ND, state, rows_R, self.table_gradient(gradient)[rows_R], rates)


def candidate_pairs(top_k: int) -> tuple[list[int], list[int]]:
    """Ranks (i, j), counted from 0, that the two sub-keys of a top-k pair can have among the best of their sides.

    The pairs (i', j') with i' <= i and j' <= j score at least as high, so the top k can only have pairs with
    (i + 1)(j + 1) <= k: about k ln k of all k^2 pairs.
    """
    pairs = [(i, j) for i in range(top_k) for j in range(top_k // (i + 1))]
    return [i for i, _ in pairs], [j for _, j in pairs]


def _rounded(rows_TJD: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to the nearest numbers of `dtype`; the gradient passes unrounded."""
    if rows_TJD.dtype == dtype:
        return rows_TJD
    return rows_TJD + (rows_TJD.to(dtype) - rows_TJD).detach()


def _sub_key_scores(query_THSC: Tensor, sub_keys_GSNC: Tensor) -> Tensor:
    """Scores of both query halves with the sub-keys of their side: (S, T, H, N)."""
    T, H, _, C = query_THSC.shape
    query_STHC = query_THSC.permute(2, 0, 1, 3)
    if len(sub_keys_GSNC) == 1:
        scores = query_STHC.reshape(2, T * H, C) @ sub_keys_GSNC[0].transpose(-1, -2)
        return scores.view(2, T, H, sub_keys_GSNC.shape[2])
    return torch.einsum("sthc,hsnc->sthn", query_STHC, sub_keys_GSNC)
