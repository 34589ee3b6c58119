"""Communication between the processes (ranks) of a parallel cell; with a single process each function is trivial.

The sequences of a batch are divided evenly among the ranks, in order. The loss of a rank is the mean over its share,
and gradients are averaged over the ranks. For a tensor that all ranks compute together, the gradient is therefore the
sum of its gradients from the losses of all ranks.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def n_ranks() -> int:
    """Number of processes that share a batch."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first_rank() -> bool:
    """Whether this process is the one that writes files and decides for all ranks."""
    return n_ranks() == 1 or dist.get_rank() == 0


def share(n: int) -> slice:
    """The slice of n items, such as the sequences of a batch, that this rank has."""
    if n_ranks() == 1:
        return slice(None)
    here = n // n_ranks()
    return slice(dist.get_rank() * here, (dist.get_rank() + 1) * here)


def groups_here(n_groups: int) -> int:
    """Number of the batch's equal, consecutive groups that this rank has; 1 if all ranks share a single group."""
    return 1 if n_groups == 1 else n_groups // n_ranks()


def gather(x: Tensor) -> Tensor:
    """x of all ranks, in order, concatenated along the first dimension; not differentiable."""
    if n_ranks() == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(n_ranks())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum of x over all ranks, differentiable."""
    return x if n_ranks() == 1 else _all_reduced(x)


def mean_over_ranks(x: Tensor) -> Tensor:
    """Mean of x over all ranks, differentiable."""
    return x if n_ranks() == 1 else sum_over_ranks(x) / n_ranks()


def as_first_rank(number: int) -> int:
    """The first rank's `number`, on every rank."""
    if n_ranks() == 1:
        return number
    first_ranks = torch.tensor(number)
    dist.broadcast(first_ranks, src=0)
    return int(first_ranks)


# An operator of torch.library, which torch.compile does not trace into.


@torch.library.custom_op("peerscale::sum_over_ranks", mutates_args=())
def _all_reduced(x: Tensor) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


@_all_reduced.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_all_reduced.register_autograd(lambda ctx, grad: _all_reduced(grad))
