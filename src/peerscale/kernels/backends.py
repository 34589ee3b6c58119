"""Which implementation of the retrieved-row operators runs: `auto` is the best that this machine can run."""

from types import ModuleType

from peerscale.kernels import native, reference

BACKENDS: dict[str, ModuleType] = {"native": native, "reference": reference}


def resolve(kernel: str) -> str:
    """The backend that `kernel` means here, as written into the run's record."""
    return "native" if kernel == "auto" else kernel
