"""Copies of tables in half precision, for the operators that read them; kept until the table changes."""

import functools

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

# For each table: what its copy was made from, and the copy. It is not part of the model, checkpoints or pickles, and is
# deleted with the table.
_copies = WeakTensorKeyDictionary()


def rounded_copy(table: Tensor, dtype: torch.dtype, kept_in: torch.dtype) -> Tensor:
    """`table` rounded to `dtype` and stored as `kept_in`, without gradient; the table itself if it has type `dtype`.

    The copy is reused until a torch optimiser steps, the table changes in place, or its storage moves. A change through
    `table.data` alone is not noticed: write under `torch.no_grad()` instead.
    """
    if table.dtype == dtype:
        return table.detach()
    if table.is_inference():  # it has no version
        return table.detach().to(dtype).to(kept_in)
    _watch_optimisers()
    made_of = (dtype, kept_in, table.device, table.data_ptr(), table._version)
    if _copies.get(table, (None,))[0] != made_of:
        _copies.pop(table, None)  # so that two copies never exist at once
        with torch.inference_mode(False), torch.no_grad():  # a copy made in evaluation may be used in training
            _copies[table] = (made_of, table.to(dtype).to(kept_in))
    return _copies[table][1]


@functools.cache
def _watch_optimisers() -> None:
    """From the first copy on, forget all copies when any optimiser steps: torch's fused optimisers, and kernels that
    work on addresses, do not increase a tensor's version."""
    register_optimizer_step_post_hook(lambda *_: _copies.clear())
