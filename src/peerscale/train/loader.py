"""Batches for Lightning: a sized loader whose position is one number, so that a resumed run continues exactly."""

from collections.abc import Iterator

import torch
from torch import Tensor

from peerscale.data.batches import TrainBatches


class StepLoader:
    """Yields a rank's share of the batches of steps 0 to steps - 1, in `micro_batches` consecutive parts.

    Lightning restores a loader exactly if it has a length and these two state methods; it would restart a plain
    DataLoader at its first batch.

    With `pin_memory` batches lie in page-locked memory, so that Lightning's copy to a GPU does not wait.
    """

    def __init__(
        self,
        batches: TrainBatches,
        steps: int,
        micro_batches: int = 1,
        *,
        rank: int = 0,
        n_ranks: int = 1,
        pin_memory: bool = False,
    ) -> None:
        self.batches, self.steps, self.micro_batches, self.next_step = batches, steps, micro_batches, 0
        self.rank, self.n_ranks, self.pin_memory = rank, n_ranks, pin_memory

    def __len__(self) -> int:
        return self.steps * self.micro_batches

    def __iter__(self) -> Iterator[Tensor]:
        for step in range(self.next_step, self.steps):
            here = torch.from_numpy(self.batches[step]).chunk(self.n_ranks)[self.rank]
            self.next_step = step + 1
            yield from (here.pin_memory() if self.pin_memory else here).chunk(self.micro_batches)

    def state_dict(self) -> dict[str, int]:
        return {"next_step": self.next_step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next_step = state["next_step"]
