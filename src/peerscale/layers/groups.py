"""Groups of sequences, over which a layer may choose or take statistics, and their parts on several devices.

A batch consists of equal, consecutive groups (`routing_group_sequences`). Each device has whole groups, or all devices
have equal parts of the only one.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def n_groups(sequences: int, group_sequences: int | None) -> int:
    """Number of groups in so many sequences; 1 if they are only a part of a group, or if groups have no fixed size."""
    return max(1, sequences // group_sequences) if group_sequences else 1


def is_spread(sequences: int, group_sequences: int | None) -> bool:
    """Whether so many sequences are this device's part of a group that several devices share."""
    joined = dist.is_available() and dist.is_initialized()
    return joined and group_sequences is not None and sequences < group_sequences


def gather(x: Tensor) -> tuple[Tensor, slice]:
    """x of all devices, concatenated in their order along the first dimension, and where this device's part is."""
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    first = dist.get_rank() * len(x)
    return torch.cat(parts), slice(first, first + len(x))


def mean_over_devices(x: Tensor) -> Tensor:
    """The mean of x over all devices, not differentiable."""
    if not (dist.is_available() and dist.is_initialized()):
        return x
    total = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total / dist.get_world_size()
