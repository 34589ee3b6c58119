"""Batches come in the same order wherever a run begins or ends, whole or in parts."""

import numpy as np
import pytest
import torch

from peerscale.data.batches import TrainBatches
from peerscale.train.loader import StepLoader


def loader(micro_batches: int = 1) -> StepLoader:
    tokens = np.arange(4000, dtype=np.uint16)
    return StepLoader(TrainBatches(tokens, seed=3, batch_sequences=4, context=16), 30, micro_batches)


@pytest.mark.parametrize(("stops_at", "micro_batches"), [(0, 1), (4, 1), (17, 2), (30, 1)])
def test_a_run_that_stops_early_goes_on_where_it_was(stops_at: int, micro_batches: int) -> None:
    first, rest = loader(micro_batches), loader(micro_batches)
    begun = [part for _, part in zip(range(stops_at * micro_batches), first, strict=False)]
    assert first.state_dict() == {"next_step": stops_at}
    rest.load_state_dict(first.state_dict())
    expected = torch.cat([torch.from_numpy(loader().batches[step]) for step in range(30)])
    assert torch.equal(torch.cat([*begun, *rest]), expected)
    assert len(rest) == 30 * micro_batches


def test_devices_share_each_batch_in_order() -> None:
    tokens = np.arange(4000, dtype=np.uint16)
    batches = TrainBatches(tokens, seed=3, batch_sequences=4, context=16)
    shares = [[*StepLoader(batches, 3, 2, rank=rank, n_ranks=2)] for rank in range(2)]
    for step in range(3):
        parts = [part for share in shares for part in share[2 * step : 2 * step + 2]]
        assert torch.equal(torch.cat(parts), torch.from_numpy(batches[step]))
