"""Exchange of the gradients of expert tables between ranks."""

from typing import Any

import lightning
from torch.nn.parallel import DistributedDataParallel

from peerscale.ops.pairs import (
    Pairs,
    TableGradient,
    collect_row_gradients,
    collected_gradients,
    total_gradient,
)
from peerscale.train.module import LanguageModel
from peerscale.train.ranks import gather, mean_over_ranks, n_ranks


class TableExchange(lightning.Callback):
    """Averages the gradients of the expert tables over the ranks, instead of DDP.

    The ranks exchange the factors of a gradient, which are as large as the batch, instead of the gradient, which is as
    large as the table. Only the `reference` kernel has no factors and exchanges gradients.
    """

    def __init__(self, module: LanguageModel) -> None:
        self.tables, self.row_sparse = module.groups.tables, module.config.optim.name == "row_sparse_adamw"
        ids = {id(table) for table in self.tables}
        names = [name for name, parameter in module.named_parameters() if id(parameter) in ids]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)
        for table in self.tables:
            collect_row_gradients(table)

    def on_before_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        shared: dict[Pairs, Pairs] = {}  # the tables of a layer are read at the same rows
        for table in self.tables:
            if table.grad is not None:
                table.grad = mean_over_ranks(table.grad)
            collected = collected_gradients(table)
            assert collected is not None
            if (here := total_gradient(collected)) is None:
                continue
            operators = here.pairs.operators
            if here.pairs not in shared:
                shared[here.pairs] = Pairs(operators, gather(here.pairs.rows_TJ), here.pairs.n_rows)
            pairs = shared[here.pairs]
            gradient = TableGradient(pairs, gather(here.coefficients_TJ) / n_ranks(), gather(here.vectors_TD))
            collected.clear()
            if self.row_sparse:
                collected.append(gradient)
            else:
                factored = operators.table_gradient(gradient)
                table.grad = factored if table.grad is None else table.grad + factored
