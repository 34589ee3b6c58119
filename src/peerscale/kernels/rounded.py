"""Tables rounded to half precision for the operators that read them, kept until the table changes."""

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

# Of each table what its copy was made of, and the copy: part of no model, checkpoint or pickle, gone with the table.
_copies = WeakTensorKeyDictionary()

# torch's fused optimisers, and kernels that are given addresses, raise no version.
register_optimizer_step_post_hook(lambda *_: _copies.clear())


def rounded_copy(table: Tensor, dtype: torch.dtype, kept_in: torch.dtype) -> Tensor:
    """`table` rounded to `dtype` and kept as `kept_in`, without a gradient; itself where `dtype` is its own.

    One copy serves all passes until an optimiser of torch's kind steps, or the table changes in place, or lies
    elsewhere. A change through `table.data` alone is not noticed: write under `torch.no_grad()` instead.
    """
    if table.dtype == dtype:
        return table.detach()
    if torch.compiler.is_compiling() or table.is_inference():  # which know no versions
        return table.detach().to(dtype).to(kept_in)
    made_of = (dtype, kept_in, table.device, table.data_ptr(), table._version)
    if _copies.get(table, (None,))[0] != made_of:
        _copies.pop(table, None)  # so that there are never two
        with torch.inference_mode(False), torch.no_grad():  # a copy made in evaluation may serve training
            _copies[table] = (made_of, table.to(dtype).to(kept_in))
    return _copies[table][1]
