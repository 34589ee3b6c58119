"""Which implementation of the retrieved-row operators runs."""

import functools
import sys

from peerscale.errors import UserError
from peerscale.kernels.compiler import CompilerError, library
from peerscale.kernels.fused import Fused
from peerscale.kernels.native import Native
from peerscale.kernels.operators import Operators
from peerscale.kernels.reference import Reference

BACKENDS: dict[str, Operators] = {"fused": Fused(), "native": Native(), "reference": Reference()}


def resolve(kernel: str) -> str:
    """The backend that `kernel` means on this machine, as written into the run's record; `auto` is the fastest.

    Raises:
        UserError: there is no backend of this name, or it cannot run here.
    """
    if kernel == "auto":
        return _fastest()
    if kernel not in BACKENDS:
        raise UserError(f"kernel {kernel!r} does not exist; there are: auto, {', '.join(BACKENDS)}")
    if kernel == "fused":
        try:
            library()
        except CompilerError as error:
            raise UserError(f"kernel fused cannot run here: {error}; auto, native and reference can") from None
    return kernel


@functools.cache
def _fastest() -> str:
    try:
        library()
    except CompilerError as error:
        print(f"notice: kernel native in place of fused, which is faster: {error}", file=sys.stderr)
        return "native"
    return "fused"
