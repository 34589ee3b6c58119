"""Batches for Lightning: a sized loader whose position is one number, so that a resumed run continues exactly."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from peerscale.data.batches import TrainBatches
from peerscale.errors import UserError
from peerscale.model.ranks import share


class StepLoader:
    """Yields this rank's share of the batches of steps 0 to steps - 1, in `micro_batches` consecutive parts.

    Lightning restores a loader exactly if it has a length and these two state methods; it would restart a plain
    DataLoader at its first batch.

    With `prefetch` the next batch is read while the model uses the current one. With a GPU it is read into page-locked
    memory, so that Lightning's copy to the GPU does not wait.
    """

    def __init__(self, batches: TrainBatches, steps: int, micro_batches: int = 1, *, prefetch: bool = False) -> None:
        self.batches, self.steps, self.micro_batches, self.next_step = batches, steps, micro_batches, 0
        self.prefetch = prefetch

    def __len__(self) -> int:
        return self.steps * self.micro_batches

    def __iter__(self) -> Iterator[Tensor]:
        steps = range(self.next_step, self.steps)
        batches = self._ahead(steps) if self.prefetch and steps else map(self._read, steps)
        for step, batch in zip(steps, batches, strict=True):
            self.next_step = step + 1
            yield from batch.chunk(self.micro_batches)

    def _ahead(self, steps: range) -> Iterator[Tensor]:
        with ThreadPoolExecutor(1) as reader:
            coming = reader.submit(self._read, steps.start)
            for step in steps[1:]:
                batch, coming = coming.result(), reader.submit(self._read, step)
                yield batch
            yield coming.result()

    def _read(self, step: int) -> Tensor:
        batch = torch.from_numpy(self.batches[step])
        here = batch[share(len(batch))]
        return here.pin_memory() if self.prefetch and torch.cuda.is_available() else here

    def state_dict(self) -> dict[str, int]:
        return {"next_step": self.next_step, "micro_batches": self.micro_batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if (begun := state.get("micro_batches", 1)) != self.micro_batches:
            raise UserError(
                f"the cell was started with trainer.micro_batches={begun} and continues only with that, not with "
                f"{self.micro_batches}"
            )
        self.next_step = state["next_step"]
