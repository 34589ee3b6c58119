"""Batches for Lightning: a sized loader whose position is one number, so that a resumed run reads on where it was."""

from collections.abc import Iterator

import torch
from torch import Tensor

from peerscale.data.batches import TrainBatches
from peerscale.errors import UserError
from peerscale.model.ranks import share


class StepLoader:
    """Yields this rank's share of batch `step` for step 0 .. steps - 1, in `micro_batches` consecutive parts.

    Lightning restores a loader that has a length and these two state methods exactly; a plain DataLoader it starts
    again at its first batch.
    """

    def __init__(self, batches: TrainBatches, steps: int, micro_batches: int = 1) -> None:
        self.batches, self.steps, self.micro_batches, self.next_step = batches, steps, micro_batches, 0

    def __len__(self) -> int:
        return self.steps * self.micro_batches

    def __iter__(self) -> Iterator[Tensor]:
        for step in range(self.next_step, self.steps):
            self.next_step = step + 1
            batch = self.batches[step]
            yield from torch.from_numpy(batch[share(len(batch))]).chunk(self.micro_batches)

    def state_dict(self) -> dict[str, int]:
        return {"next_step": self.next_step, "micro_batches": self.micro_batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if (begun := state.get("micro_batches", 1)) != self.micro_batches:
            raise UserError(
                f"the cell was begun with trainer.micro_batches={begun}, and goes on only with that, not with "
                f"{self.micro_batches}"
            )
        self.next_step = state["next_step"]
