"""Choice of the backend, the implementation of the operators."""

import functools
import sys

import torch

from peerscale.errors import UserError
from peerscale.ops.cpp_operators import CppOperators
from peerscale.ops.operators import Operators
from peerscale.ops.reference import ReferenceOperators
from peerscale.ops.triton_operators import TritonOperators

BACKENDS: dict[str, Operators] = {
    operators.name: operators for operators in (CppOperators(), TritonOperators(), Operators(), ReferenceOperators())
}


def choose_operators(kernel: str = "auto", device: str | None = None) -> Operators:
    """The backend named `kernel`, for tensors on this type of device (by default torch's default device).

    `auto` is the fastest one that can run: `cpp` on a CPU, `triton` on a GPU, else `torch`.

    Raises:
        UserError: there is no backend of this name, or it cannot run here.
    """
    device = device or torch.get_default_device().type
    if kernel == "auto":
        return _fastest(device)
    if kernel not in BACKENDS:
        raise UserError(f"kernel {kernel!r} does not exist; there are: auto, {', '.join(BACKENDS)}")
    if why := BACKENDS[kernel].obstacle(device):
        others = [name for name, operators in BACKENDS.items() if operators.obstacle(device) is None]
        raise UserError(f"kernel {kernel} cannot run here: {why}; these can: auto, {', '.join(others)}")
    return BACKENDS[kernel]


@functools.cache
def _fastest(device: str) -> Operators:
    best = {"cpu": "cpp", "cuda": "triton"}.get(device, "torch")
    if why := BACKENDS[best].obstacle(device):
        print(f"notice: kernel torch in place of the faster {best}: {why}", file=sys.stderr)
        best = "torch"
    return BACKENDS[best]
