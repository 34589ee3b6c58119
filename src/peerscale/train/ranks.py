"""Communication between the processes (ranks) of a parallel cell; with a single process each function is trivial.

The sequences of a batch are divided evenly among the ranks, in order. The loss of a rank is the mean over its share,
and gradients are averaged over the ranks.
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


def gather(x: Tensor) -> Tensor:
    """x of all ranks, in order, concatenated along the first dimension; not differentiable."""
    if n_ranks() == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(n_ranks())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum of x over all ranks; not differentiable."""
    if n_ranks() == 1:
        return x
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def mean_over_ranks(x: Tensor) -> Tensor:
    """Mean of x over all ranks; not differentiable."""
    return x if n_ranks() == 1 else sum_over_ranks(x) / n_ranks()


def as_first_rank(number: int) -> int:
    """The first rank's `number`, on every rank."""
    if n_ranks() == 1:
        return number
    first_ranks = torch.tensor(number)
    dist.broadcast(first_ranks, src=0)
    return int(first_ranks)
