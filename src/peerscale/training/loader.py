"""Batches for Lightning: a sized loader whose position is one number, so that a resumed run reads on where it was."""

from collections.abc import Iterator

import torch
from torch import Tensor

from peerscale.data.batches import TrainBatches
from peerscale.model.ranks import share


class StepLoader:
    """Yields this rank's share of batch `step` for step 0 .. steps - 1.

    Lightning restores a loader that has a length and these two state methods exactly; a plain DataLoader it starts
    again at its first batch.
    """

    def __init__(self, batches: TrainBatches, steps: int) -> None:
        self.batches, self.steps, self.next_step = batches, steps, 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Tensor]:
        for step in range(self.next_step, self.steps):
            self.next_step = step + 1
            batch = self.batches[step]
            yield torch.from_numpy(batch[share(len(batch))])

    def state_dict(self) -> dict[str, int]:
        return {"next_step": self.next_step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next_step = state["next_step"]
