"""With `trainer.compile` torch compiles the backbone; the layer under study stays out of the graph."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from peerscale.config.schema import load
from peerscale.model.build import build_model
from peerscale.model.transformer import Transformer

SIZE = ["d_model=16", "context=8", "n_layers=2", "batch_sequences=16", "budget=1e12", "data.vocab_size=300"]
CASES = {
    "dense": ["ffn=dense", "trainer.activation_checkpointing=true"],
    "token choice": ["ffn=moe_token_choice"],
    "peer": ["ffn=peer", "ffn.n_experts=64", "ffn.top_k=4", "ffn.query_norm=false", "replaced=all"],
}


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    counters.clear()


def model_of(words: list[str], compile: bool = True) -> Transformer:
    """As for training, which compiles after the model is built."""
    model = build_model(load([*SIZE, *words]))
    if compile:
        model.compile_backbone()
    return model


def passes(words: list[str], compile: bool) -> list[Tensor]:
    """Logits and gradients of three batches, of two shapes."""
    torch.manual_seed(0)
    model, results = model_of(words, compile), []
    for sequences in (16, 8, 16):
        logits = model(torch.randint(300, (sequences, 8)))
        results += [logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))]
    return results


@pytest.mark.parametrize("case", CASES)
def test_a_compiled_model_computes_the_same(case: str) -> None:
    expected = passes(CASES[case], compile=False)
    assert not counters["stats"]
    found = passes(CASES[case], compile=True)
    assert counters["stats"]["unique_graphs"] > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.detach().abs().max()))


@pytest.mark.parametrize("ffn", ["peer", "moe"])
def test_retrieval_and_routing_run_outside_the_graph(ffn: str) -> None:
    model, traced = model_of([f"ffn={ffn}", "replaced=all"]), []
    for block in model.blocks:
        projection = block.ffn.query if ffn == "peer" else block.ffn.router
        projection.register_forward_hook(lambda *_: traced.append(torch.compiler.is_compiling()))
    for _ in range(3):  # a part of a graph would be called only as it is traced
        model(torch.randint(300, (16, 8)))
    assert traced == [False] * 6


def test_a_process_compiles_every_model_that_it_builds() -> None:
    """However many there are: torch compiles one function only so often."""
    compiled = []
    with torch._dynamo.config.patch(recompile_limit=2):
        for width in (8, 16, 24, 32):
            model_of(["ffn=dense", f"d_model={width}"])(torch.randint(300, (8, 8)))
            compiled.append(counters["stats"]["unique_graphs"])
    assert compiled == [1, 2, 3, 4]
