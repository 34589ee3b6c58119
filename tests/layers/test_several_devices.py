"""Two processes, each with half of the sequences, compute what one computes with all of them."""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from peerscale.layers import Peer, Pkm
from peerscale.layers.moe import ExpertChoiceMoe, MoeConfig, TokenChoiceMoe
from peerscale.ops.backends import choose_operators

B, T, D = 8, 3, 6


def layers() -> Iterator[tuple[str, nn.Module]]:
    """Each as new; a group of 8 sequences lies on both devices, one of 4 or 2 on a single one."""
    kernel, chooses = choose_operators("reference"), MoeConfig(n_experts=4, capacity_factor=2.0)
    chosen = MoeConfig(n_experts=4, top_k=2, load_balance_weight=1.0)
    torch.manual_seed(0)
    for group in (8, 4, 2):
        yield f"expert choice, {group}", ExpertChoiceMoe(D, 8, chooses, group)
        yield f"token choice, {group}", TokenChoiceMoe(D, 8, chosen, group, z_loss_weight=0.1)
    yield "peer", Peer(D, 16, 2, 3, query_norm=False, operators=kernel)
    for group in (4, 2):
        yield f"pkm, {group}", Pkm(D, 16, 2, 3, query_bias=False, group_sequences=group, operators=kernel)


def passed(layer: nn.Module, x: Tensor, probe: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The output and, by name, the gradients of a mean loss, the auxiliary one included, and the buffers."""
    layer = layer.double()
    y = layer(x)
    auxiliary = getattr(layer, "auxiliary_loss", None)
    loss = (y * probe).mean() + (0 if auxiliary is None else auxiliary)
    loss.backward()
    gradients = {name: weight.grad for name, weight in layer.named_parameters()}
    return y.detach(), gradients | {name: value.double() for name, value in layer.named_buffers()}


def device_of_two(rank: int, folder: str, x: Tensor, probe: Tensor) -> None:
    """Program of a process: keep what each layer gives with this device's half."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {name: passed(layer, x.chunk(2)[rank], probe.chunk(2)[rank]) for name, layer in layers()}
    torch.save(found, f"{folder}/{rank}")
    dist.destroy_process_group()


def test_outputs_gradients_and_statistics_are_those_of_one_device(tmp_path: Path) -> None:
    torch.manual_seed(1)
    x, probe = torch.randn(2, B, T, D, dtype=torch.float64)
    x[B // 2] = x[0]  # equal scores on two devices: one device would choose the first
    torch.multiprocessing.spawn(device_of_two, (str(tmp_path), x, probe), nprocs=2)
    first, second = (torch.load(tmp_path / str(rank)) for rank in range(2))
    for name, layer in layers():
        y, values = passed(layer, x, probe)
        outputs, parts = zip(first[name], second[name], strict=True)
        torch.testing.assert_close(torch.cat(outputs), y, msg=name)
        for what, value in values.items():
            # As DDP averages gradients; what is no gradient is the same on both.
            torch.testing.assert_close((parts[0][what] + parts[1][what]) / 2, value, msg=f"{name}: {what}")
            assert value.any() or "num_batches" in what, f"{name}: {what} shows nothing"
