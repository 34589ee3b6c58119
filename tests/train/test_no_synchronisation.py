"""In a training step the host asks the device for no value, so that it never waits.

On the meta device, which has no values: what asks for one fails, and so does what mixes devices. Triton's kernels are
not launched there.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peerscale.config.schema import load
from peerscale.ops import triton_operators
from peerscale.plan.plan import plan
from peerscale.train.module import LanguageModel
from peerscale.train.optimizer import build_optimizer

SIZE = ["d_model=16", "context=8", "n_layers=1", "batch_sequences=16", "budget=1e12", "data.vocab_size=300"]
GROUPS = ["trainer.micro_batches=2", "routing_group_sequences=4"]
ROWS = ["ffn.n_experts=64", "ffn.n_heads=2", "ffn.top_k=4", "ffn.query_bias=false"]
CASES = {
    "dense": ["ffn=dense", "trainer.activation_checkpointing=true"],
    "expert choice": ["ffn=moe", "ffn.n_experts=4", *GROUPS],
    "token choice": ["ffn=moe_token_choice"],
    "fine-grained": ["ffn=fine_grained_moe", *GROUPS],
    "balanced": ["ffn=balanced_moe"],
    "pkm": ["ffn=pkm", *ROWS],
    "memory_plus": ["ffn=memory_plus", *ROWS[:3]],
    "engram": ["ffn=engram"],
    "peer": ["ffn=peer", *ROWS, *GROUPS, "replaced=all"],
}

ASKS = {
    "bincount": lambda x: torch.bincount(x),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "truth": lambda x: bool(x.sum() > 0),
    "copy to the host": lambda x: x.cpu(),
    "copy from the host": lambda x: x + torch.tensor([1]).to("meta"),
}


class OneDevice(TorchDispatchMode):
    """Fails where an operator takes from one device to another."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        devices = {tensor.device for tensor in tree_leaves((args, kwargs, out)) if isinstance(tensor, Tensor)}
        assert len(devices) < 2, function
        return out


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta stands for a GPU with Triton and autocast."""
    autocast, enabled = torch.autocast, torch.is_autocast_enabled
    monkeypatch.setattr(triton_operators, "_runs_on", lambda device: device == "meta")
    monkeypatch.setattr(triton_operators, "_launch", lambda *_, **__: None)
    monkeypatch.setattr(triton_operators.importlib.util, "find_spec", lambda _: True)
    monkeypatch.setattr(torch, "autocast", lambda device, *a, **k: autocast(device.replace("meta", "cpu"), *a, **k))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: device != ("meta",) and enabled(*device))


def train(overrides: list[str], dtype: torch.dtype) -> None:
    """Two whole steps."""
    config = load([*SIZE, *overrides, "trainer.kernel=triton"])
    module = LanguageModel(config, plan(config), "meta").to("meta", dtype)
    optimizer, tokens = build_optimizer(module.groups, config, module.plan), torch.zeros(8, 9, dtype=torch.long)
    tokens = tokens.to("meta")
    with OneDevice():
        for _ in range(2):
            for _ in range(2):
                module.training_step(tokens, 0)["loss"].backward()
            torch.nn.utils.clip_grad_norm_(module.groups.clipped, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            for part in module.model.modules():
                getattr(part, "after_step", lambda: None)()


@pytest.mark.parametrize("case", CASES)
def test_a_step_asks_for_no_value(case: str) -> None:
    # Grouped products in bfloat16 only: see below.
    train(CASES[case], torch.bfloat16 if case in ("token choice", "fine-grained", "balanced") else torch.float32)


@pytest.mark.parametrize("asks", ASKS)
def test_what_asks_for_a_value_is_found(asks: str) -> None:
    x = torch.zeros(3, dtype=torch.long, device="meta")
    with OneDevice(), pytest.raises((RuntimeError, NotImplementedError, AssertionError)):
        ASKS[asks](x)


def test_grouped_products_in_float32_do_wait() -> None:
    """torch multiplies groups at once in bfloat16 only (on an H100 or B200); else it copies their sizes to the host."""
    with pytest.raises(RuntimeError, match="Expected inputs of BF16 type"):
        train(CASES["token choice"], torch.float32)
