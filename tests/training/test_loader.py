"""Batches that are read ahead are those that are not, in the same order, wherever a run begins or ends."""

import numpy as np
import pytest
import torch

from peerscale.data.batches import TrainBatches
from peerscale.training.loader import StepLoader


def loader(steps: int, *, micro_batches: int = 1, prefetch: bool = True) -> StepLoader:
    tokens = np.arange(4000, dtype=np.uint16)
    return StepLoader(
        TrainBatches(tokens, seed=3, batch_sequences=4, context=16), steps, micro_batches, prefetch=prefetch
    )


@pytest.mark.parametrize(("begun", "micro_batches"), [(0, 1), (0, 2), (17, 2), (30, 1)])
def test_prefetched_batches_are_the_same(begun: int, micro_batches: int) -> None:
    one, other = (loader(30, micro_batches=micro_batches, prefetch=prefetch) for prefetch in (True, False))
    for each in (one, other):
        each.load_state_dict({"next_step": begun, "micro_batches": micro_batches})
    read = list(one)
    assert len(read) == (30 - begun) * micro_batches
    assert all(torch.equal(a, b) for a, b in zip(read, other, strict=True))


def test_a_run_that_stops_early_goes_on_where_it_was_whatever_was_read_ahead() -> None:
    first = loader(10)
    for _, _ in zip(range(4), first, strict=False):
        pass
    assert first.state_dict()["next_step"] == 4
    rest = loader(10)
    rest.load_state_dict(first.state_dict())
    assert torch.equal(next(iter(rest)), torch.from_numpy(loader(10).batches[4]))


def test_what_cannot_be_read_ends_the_run_with_its_reason() -> None:
    class Broken(TrainBatches):
        def __getitem__(self, step: int) -> np.ndarray:
            if step == 2:
                raise OSError("the disk is gone")
            return super().__getitem__(step)

    tokens = np.arange(4000, dtype=np.uint16)
    batches = Broken(tokens, seed=3, batch_sequences=4, context=16)
    with pytest.raises(OSError, match="the disk is gone"):
        list(StepLoader(batches, 10, prefetch=True))
