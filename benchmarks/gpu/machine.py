"""The device that everything here runs on, a GPU or in a rehearsal a CPU: its clock and its memory."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timing import in_turns

from peerscale.errors import UserError
from peerscale.ops.backends import choose_operators
from peerscale.ops.operators import Operators


@dataclass(frozen=True)
class Machine:
    """A GPU, or in a rehearsal a CPU with tiny sizes."""

    type: str
    """As torch calls it: cuda or cpu."""
    kernel: str
    """The backend that is tested and measured."""
    rehearse: bool

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name() if self.type == "cuda" else "a CPU, in a rehearsal"

    @property
    def operators(self) -> Operators:
        return choose_operators(self.kernel, self.type)

    def synchronise(self) -> None:
        """Wait for the device; fails with a RuntimeError if it answers no more."""
        if self.type == "cuda":
            torch.cuda.synchronize()

    def free(self) -> None:
        """Give a GPU's memory back that nothing holds, and count its peak anew."""
        if self.type == "cuda":
            gc.collect()
            self.synchronise()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int | None:
        """The most memory that tensors took since `free`; None on a CPU, where it is not counted."""
        return torch.cuda.max_memory_allocated() if self.type == "cuda" else None

    def autocast(self, precision: str) -> Any:
        """As the trainer computes in `precision`."""
        return torch.autocast(self.type, torch.bfloat16, precision == "bf16")

    def seconds(self, step: Callable[[], object]) -> list[float]:
        """Seconds of single calls, the compilation of the first ones not among them.

        On a GPU by its own clock, with as many calls as half a second has, but 5 to 50. They follow one another without
        a wait, so that the host's time counts only where the GPU has to wait for it.
        """
        if self.type == "cpu":
            return in_turns({"": step}, 2)[""]
        for _ in range(3):
            step()
        self.synchronise()
        begun = time.perf_counter()
        step()
        self.synchronise()
        repeats = max(5, min(50, int(0.5 / (time.perf_counter() - begun))))
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for start, end in events:
            start.record()
            step()
            end.record()
        self.synchronise()
        return [start.elapsed_time(end) / 1e3 for start, end in events]


def find_machine(rehearse: bool) -> Machine:
    """The GPU, or for a rehearsal a CPU with torch's operators: Triton's interpreter would take minutes.

    Raises:
        UserError: there is no GPU, or no Triton.
    """
    if rehearse:
        return Machine("cpu", "torch", True)
    if not torch.cuda.is_available():
        raise UserError("torch sees no GPU here; to go through everything on a CPU: --rehearse")
    choose_operators("triton", "cuda")
    return Machine("cuda", "triton", False)
