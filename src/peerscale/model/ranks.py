"""Communication between the processes of a parallel cell, its ranks; with a single process each function is trivial.

The sequences of a batch are shared evenly among the ranks, in order. The loss of a rank is the mean over its share, and
gradients are averaged over the ranks; so the gradient of something that the ranks compute together is the sum over the
losses of all ranks.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def n_ranks() -> int:
    """How many processes share a batch."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first_rank() -> bool:
    """Whether this process is the one that writes, and decides for all."""
    return n_ranks() == 1 or dist.get_rank() == 0


def share(batch_sequences: int) -> slice:
    """The sequences of a batch that lie on this rank."""
    if n_ranks() == 1:
        return slice(None)
    here = batch_sequences // n_ranks()
    return slice(dist.get_rank() * here, (dist.get_rank() + 1) * here)


@torch.compiler.disable
def gather(x: Tensor) -> Tensor:
    """The x of all ranks in order, concatenated along the first dimension; not differentiable."""
    if n_ranks() == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(n_ranks())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


def gather_on_first(x: Tensor) -> Tensor:
    """The x of all ranks, concatenated, on the first rank; their own x on the others. In the CPU's memory."""
    x = x.cpu()
    parts = [torch.empty_like(x) for _ in range(n_ranks())] if is_first_rank() else None
    dist.gather(x, parts)
    return x if parts is None else torch.cat(parts)


@torch.compiler.disable
def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of the x of all ranks, differentiable."""
    return x if n_ranks() == 1 else with_adjoint(x, _summed, _summed)


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of the x of all ranks, differentiable."""
    return x if n_ranks() == 1 else sum_over_ranks(x) / n_ranks()


def as_first_rank(decision: bool) -> bool:
    """The first rank's `decision`, on every rank."""
    if n_ranks() == 1:
        return decision
    first_ranks = torch.tensor(decision, dtype=torch.uint8)
    dist.broadcast(first_ranks, src=0)
    return bool(first_ranks)


def with_adjoint(x: Tensor, collective: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor]) -> Tensor:
    """`collective(x)`, a linear function of the x of all ranks, whose gradient goes back through its adjoint."""
    return _Collective.apply(x, collective, adjoint)


class _Collective(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, collective: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.adjoint = adjoint
        return collective(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # pyrefly: ignore[bad-override]
        return ctx.adjoint(grads[0]), None, None


def _summed(x: Tensor) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total
