"""The device that everything here runs on, a GPU or in a rehearsal a CPU: its clock and its memory."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timing import in_turns

from peerscale.ops.backends import choose_operators
from peerscale.ops.operators import Operators


@dataclass(frozen=True)
class Machine:
    """A device type as torch calls it, the backend that is measured, and whether this is a rehearsal."""

    type: str = "cuda"
    kernel: str = "triton"
    rehearse: bool = False

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name() if self.type == "cuda" else "a CPU, in a rehearsal"

    @property
    def operators(self) -> Operators:
        return choose_operators(self.kernel, self.type)

    def free(self) -> None:
        """Give a GPU's memory back that nothing holds, and count its peak anew; fails if it answers no more."""
        if self.type == "cuda":
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int | None:
        """The most memory that tensors took since `free`; None on a CPU, where it is not counted."""
        return torch.cuda.max_memory_allocated() if self.type == "cuda" else None

    def autocast(self) -> Any:
        return torch.autocast(self.type, torch.bfloat16)

    def seconds(self, step: Callable[[], object]) -> list[float]:
        """Seconds of single calls after some that compile: on a GPU by its own clock, 5 to 50 calls without a wait
        between them, so that the host's time counts only where the GPU has to wait for it."""
        if self.type == "cpu":
            return in_turns({"": step}, 2)[""]
        for _ in range(3):
            step()
        torch.cuda.synchronize()
        begun = time.perf_counter()
        step()
        torch.cuda.synchronize()
        repeats = max(5, min(50, int(0.5 / (time.perf_counter() - begun))))
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in events:
            start.record()
            step()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]
