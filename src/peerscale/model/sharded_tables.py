"""Expert tables whose rows are split evenly over the ranks, in order.

Ranks exchange tokens rather than rows, since there are fewer of them: every rank gets the retrievals of all ranks and
computes what its own rows contribute; the sums go back to the ranks of the tokens. So the whole gradient of a row is
formed on the rank that holds it.

Shapes: T tokens of this rank, M of all, D model width, J retrieved rows a token, L rows here.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from peerscale.kernels.operators import Operators
from peerscale.model.ranks import gather, n_ranks, share, with_adjoint


class ShardedTables:
    """The operators of `Operators` that read tables, for tables that hold only this rank's rows."""

    def __init__(self, here: Operators) -> None:
        """`here` computes with the rows of this rank."""
        self.here = here
        self.product_key_top_k = here.product_key_top_k

    @torch.compiler.disable
    def single_neuron_experts(
        self, x_TD: Tensor, w_down_LD: Tensor, w_up_LD: Tensor, rows_TJ: Tensor, gates_TJ: Tensor, activation: str
    ) -> Tensor:
        rows, gates = _of_this_rank(rows_TJ, gates_TJ, len(w_down_LD))
        x_MD = with_adjoint(x_TD, gather, _sum_of_shares)
        y_MD = self.here.single_neuron_experts(x_MD, w_down_LD, w_up_LD, rows, gates, activation)
        return with_adjoint(y_MD, _sum_of_shares, gather)

    @torch.compiler.disable
    def weighted_rows(self, table_LD: Tensor, rows_TJ: Tensor, weights_TJ: Tensor) -> Tensor:
        rows, weights = _of_this_rank(rows_TJ, weights_TJ, len(table_LD))
        return with_adjoint(self.here.weighted_rows(table_LD, rows, weights), _sum_of_shares, gather)


def keep_own_rows(table: nn.Parameter) -> None:
    """Cut a whole table down to the rows of this rank."""
    table.data = table.data[share(len(table))].clone()


def _of_this_rank(rows_TJ: Tensor, weights_TJ: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
    """The retrievals of all ranks that hit the `n_rows` rows here, counted from the first of these, and their weights.

    Tokens differ in how many they have, so the shorter lists are padded with weight 0 and a row that is retrieved
    anyway: a row-sparse optimiser would update any other row as well.
    """
    rows_MJ = gather(rows_TJ) - dist.get_rank() * n_rows
    weights_MJ = with_adjoint(weights_TJ, gather, _sum_of_shares)
    is_here_MJ = (rows_MJ >= 0) & (rows_MJ < n_rows)
    most = max(1, int(is_here_MJ.sum(1).max()))
    order = is_here_MJ.byte().argsort(dim=1, descending=True, stable=True)[:, :most]
    is_here = is_here_MJ.gather(1, order)
    some_row = rows_MJ[is_here_MJ][:1] if is_here_MJ.any() else rows_MJ.new_zeros(1)
    rows = torch.where(is_here, rows_MJ.gather(1, order), some_row)
    return rows, weights_MJ.gather(1, order) * is_here


def _sum_of_shares(y_MD: Tensor) -> Tensor:
    """This rank's tokens of the sum of y over all ranks; the adjoint of `gather`."""
    parts = [part.contiguous() for part in y_MD.chunk(n_ranks())]
    total = torch.empty_like(parts[0])
    dist.reduce_scatter(total, parts)
    return total
