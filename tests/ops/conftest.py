"""On a machine with a GPU, `test_triton` runs these tests once more there."""

import os
from collections.abc import Callable, Iterator

import pytest
import torch

if device := os.environ.get("PEERSCALE_TEST_DEVICE"):
    torch.set_default_device(device)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """`torch.set_num_threads`, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
