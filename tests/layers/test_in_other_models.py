"""PEER and PKM in a plain PyTorch model, with a plain optimiser."""

import re
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from peerscale.files import ROOT
from peerscale.layers import Peer, Pkm
from peerscale.ops.backends import choose_operators
from peerscale.train.optimizer import parameter_groups


class TwoLayers(nn.Module):
    """Someone else's model: tokens to the probability of two classes."""

    def __init__(self, kernel: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.memory = Pkm(16, n_experts=64, n_heads=2, top_k=4, query_bias=False, operators=choose_operators(kernel))
        self.experts = Peer(16, 64, 2, 4, 8, activation="relu", query_norm=False, operators=choose_operators(kernel))
        self.head = nn.Linear(16, 2)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.embedding(tokens_BT)
        x_BTD = x_BTD + self.memory(x_BTD)
        return self.head((x_BTD + self.experts(x_BTD)).mean(1))


class Wrapped(nn.Module):
    """A layer around another one, whose tables it passes on."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Peer(16, n_experts=64, n_heads=2, top_k=4)

    def expert_tables(self) -> list[nn.Parameter]:
        return self.inner.expert_tables()


def test_importing_a_layer_imports_no_configuration_plan_or_study() -> None:
    program = """
import sys
from peerscale.layers import Peer
ours = {name.split(".")[1] for name in sys.modules if name.startswith("peerscale.")}
assert ours == {"errors", "files", "layers", "ops", "types"}, ours
assert not {*sys.modules} & {"hydra", "omegaconf", "yaml", "pandas", "lightning", "wandb"}
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_tables_that_a_layer_passes_on_are_trained_once() -> None:
    groups, inner = parameter_groups(model := Wrapped()), model.inner
    assert [id(table) for table in groups.tables] == [id(inner.w_down), id(inner.w_up)]
    everything = [*groups.tables, *groups.matrices, *groups.vectors]
    assert sorted(map(id, everything)) == sorted(map(id, model.parameters()))


def test_trains_as_the_readable_reference_does() -> None:
    torch.manual_seed(0)
    fast = TwoLayers("auto")
    readable = TwoLayers("reference")
    readable.load_state_dict(fast.state_dict())
    tokens, classes = torch.randint(50, (8, 5)), torch.randint(2, (8,))
    losses: dict[str, list[float]] = {"fast": [], "readable": []}
    for name, model in (("fast", fast), ("readable", readable)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(5):
            loss = nn.functional.cross_entropy(model(tokens), classes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    assert losses["fast"] == pytest.approx(losses["readable"], rel=1e-4)
    assert losses["fast"][-1] < losses["fast"][0]
    for (name, one), other in zip(fast.named_parameters(), readable.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    assert sum(len(layer.expert_tables()) for layer in (fast.memory, fast.experts)) == 3


def test_the_lines_of_the_readme_run() -> None:
    (lines,) = [
        code for code in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if "Pkm" in code
    ]
    exec(lines, {})
