"""On a machine with a GPU, `test_triton` runs these tests once more there."""

import os

import torch

if device := os.environ.get("PEERSCALE_TEST_DEVICE"):
    torch.set_default_device(device)
