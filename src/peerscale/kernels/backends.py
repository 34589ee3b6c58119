"""Which implementation of the retrieved-row operators runs."""

import functools
import sys

import torch

from peerscale.errors import UserError
from peerscale.kernels import gpu
from peerscale.kernels.compiler import CompilerError, library
from peerscale.kernels.fused import Fused
from peerscale.kernels.native import Native
from peerscale.kernels.operators import Operators
from peerscale.kernels.reference import Reference

BACKENDS: dict[str, Operators] = {
    "fused": Fused(),
    "triton": gpu.Triton(),
    "native": Native(),
    "reference": Reference(),
}


@torch.compiler.assume_constant_result
def resolve(kernel: str, device: str = "cpu") -> str:
    """The backend that `kernel` means for tensors on this type of device, as written into the run's record.

    `auto` is the fastest that can run: `fused` on a CPU, `triton` on a GPU, else `native`.

    Raises:
        UserError: there is no backend of this name, or it cannot run here.
    """
    if kernel == "auto":
        return _fastest(device)
    if kernel not in BACKENDS:
        raise UserError(f"kernel {kernel!r} does not exist; there are: auto, {', '.join(BACKENDS)}")
    if why := obstacle(kernel, device):
        others = [name for name in BACKENDS if obstacle(name, device) is None]
        raise UserError(f"kernel {kernel} cannot run here: {why}; these can: auto, {', '.join(others)}")
    return kernel


def operators_for(kernel: str, device: str) -> Operators:
    """The operators of the backend that `kernel` means for tensors on this type of device; raises as `resolve`."""
    return BACKENDS[resolve(kernel, device)]


def obstacle(kernel: str, device: str) -> str | None:
    """Why a backend cannot run on such a device here, in one line; `None` if it can."""
    match kernel:
        case "triton":
            return gpu.obstacle(device)
        case "fused" if device != "cpu":
            return "it is for the CPU"
        case "fused":
            try:
                library()
            except CompilerError as error:
                return str(error)
    return None


@functools.cache
def _fastest(device: str) -> str:
    best = {"cpu": "fused", "cuda": "triton"}.get(device, "native")
    if why := obstacle(best, device):
        print(f"notice: kernel native in place of {best}, which is faster: {why}", file=sys.stderr)
        return "native"
    return best
