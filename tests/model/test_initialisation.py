"""The weights that training starts from: those of the published runs, bit for bit, and drawn by every layer itself."""

import hashlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import peerscale.model.build
from peerscale.config.schema import Config, load
from peerscale.errors import UserError
from peerscale.files import ROOT
from peerscale.layers.dense import NoLayer
from peerscale.model.build import build_model
from peerscale.model.transformer import Transformer

DRAWS = "1866a7ec96260b60"
"""Of torch's generator on the machine that trained the published runs: others may round a normal number otherwise."""

STARTS = {
    ("balanced_moe", "d16"): ("5b2df93f0fac710d", "b61ca676438fdbbe"),
    ("balanced_moe", "d32"): ("809379af55659a9f", "ba90fd5f42c0036c"),
    ("dense", "d16"): ("5eae5fd78785cee2", "fe400fef965fd053"),
    ("dense", "d32"): ("1f1cbed2577d89eb", "c2893d8b1e9ff508"),
    ("dense_renamed", "d16"): ("5eae5fd78785cee2", "fe400fef965fd053"),
    ("dense_renamed", "d32"): ("1f1cbed2577d89eb", "c2893d8b1e9ff508"),
    ("engram", "d16"): ("791543bf0cb0fe74", "3ba382708784670f"),
    ("engram", "d32"): ("17f31973b55db0fe", "91d5180a4b09c5e5"),
    ("engram_one_row", "d16"): ("a2e35800df4198a2", "1c500f030d3c57e0"),
    ("engram_one_row", "d32"): ("3617bb558f1e67c7", "cc96bfa07356e777"),
    ("fine_grained_moe", "d16"): ("1f8ea2fa6abbc92a", "b720425c5d9fe268"),
    ("fine_grained_moe", "d32"): ("846d100b2c0a853a", "1d7e056c91672a8b"),
    ("memory_plus", "d16"): ("9c12a4b180072748", "290da003cde0757c"),
    ("memory_plus", "d32"): ("5ba599e504a099a2", "5e5822a66ad2af1f"),
    ("moe", "d16"): ("1296ddd6ffa3a2d3", "9fcfffd029deaa49"),
    ("moe", "d32"): ("acfe71ee4070f287", "ee0a10395198ddea"),
    ("moe_token_choice", "d16"): ("1296ddd6ffa3a2d3", "9fcfffd029deaa49"),
    ("moe_token_choice", "d32"): ("acfe71ee4070f287", "ee0a10395198ddea"),
    ("moe_token_choice_32", "d16"): ("b36d769e579e39f3", "c99309e7ab4b6555"),
    ("moe_token_choice_32", "d32"): ("e76a9502171351fc", "5bb31896450694c0"),
    ("no_layer", "d16"): ("45ec51bcf066e6ab", "4cdf021aeac39909"),
    ("no_layer", "d32"): ("73da2f5ffbd82759", "3954967adb7f36eb"),
    ("peer", "d16"): ("c610eee6e4f2bb4d", "ef576d0793b32c5d"),
    ("peer", "d32"): ("97a9e5cf1fb4660a", "8ed89603ccd1cc76"),
    ("peer_2_heads", "d16"): ("022f73d0696e0f48", "b580b559fdadae2e"),
    ("peer_2_heads", "d32"): ("e33d62756bdd4d2c", "48e06e7f9222ba76"),
    ("peer_9216", "d16"): ("e02523a2495a1ece", "c651be8a9cee656b"),
    ("peer_9216", "d32"): ("c9cf7362f6c48116", "0187c159c31bb1ee"),
    ("pkm", "d16"): ("6b46fd22b5ce81bb", "9cd91bd48edeece7"),
    ("pkm", "d32"): ("8203587ad348cb43", "9b1b38664eaffff0"),
    ("pkm_1_head", "d16"): ("2b1f36f416371271", "ef94a7f8338c2780"),
    ("pkm_1_head", "d32"): ("c2a29c4b017f4a11", "c4c50f346b0b1bbf"),
    ("pkm_equal_top_k", "d16"): ("6b46fd22b5ce81bb", "9cd91bd48edeece7"),
    ("pkm_equal_top_k", "d32"): ("8203587ad348cb43", "9b1b38664eaffff0"),
    ("relu_squared", "d16"): ("5eae5fd78785cee2", "fe400fef965fd053"),
    ("relu_squared", "d32"): ("1f1cbed2577d89eb", "c2893d8b1e9ff508"),
    ("swiglu", "d16"): ("c4ae47638c8d4c74", "aaff1f1322ed0480"),
    ("swiglu", "d32"): ("765828e126c84888", "7b44c26737c3a138"),
    ("wasted", "d16"): ("5eae5fd78785cee2", "fe400fef965fd053"),
    ("wasted", "d32"): ("1f1cbed2577d89eb", "c2893d8b1e9ff508"),
    ("wide_dense", "d16"): ("a7b50dbd405010cd", "ae3ae61cd846df7a"),
    ("wide_dense", "d32"): ("7bb241cb77fcfe03", "fdd6a6783acbf4e7"),
}
"""By layer and size, with seed 0: of all parameters in order, and of the state that the generator is left in."""


def digest(*tensors: Tensor) -> str:
    """16 hexadecimal digits of the SHA-256 of the bytes."""
    return hashlib.sha256(b"".join(x.detach().numpy().tobytes() for x in tensors)).hexdigest()[:16]


def draws() -> str:
    torch.manual_seed(0)
    layer = nn.Linear(40, 60)
    return digest(layer.weight, layer.bias, torch.randn(50, 70), nn.init.xavier_uniform_(torch.empty(30, 80)))


def test_every_layer_of_conf_is_pinned() -> None:
    assert {name for name, _ in STARTS} == {path.stem for path in (ROOT / "conf" / "ffn").glob("*.yaml")}


@pytest.mark.skipif(draws() != DRAWS, reason="torch draws other numbers here")
@pytest.mark.parametrize(("ffn", "size"), STARTS)
def test_starts_from_the_weights_of_the_published_runs(ffn: str, size: str) -> None:
    then = ["ffn.n_experts=16", "ffn.capacity_factor=1.0"] if ffn == "moe" else []
    config = load([f"ffn={ffn}", f"d_model={size.removeprefix('d')}", *then])
    torch.manual_seed(0)
    weights = digest(*build_model(config).parameters())
    assert (weights, digest(torch.get_rng_state())) == STARTS[ffn, size]


class Gate(nn.Module):
    """As a user could write it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class InitialisedGate(Gate):
    def init_weights(self, output_scale: float) -> None:
        nn.init.constant_(self.gate.weight, output_scale)


@pytest.fixture
def small() -> Config:
    return load(["ffn=dense", "d_model=8", "n_layers=2", "data.vocab_size=257", "context=6"])


def build_with(layer: nn.Module, config: Config, monkeypatch: pytest.MonkeyPatch) -> Transformer:
    monkeypatch.setattr(peerscale.model.build, "layers_under_study", lambda *_: iter([layer]))
    return build_model(config)


def test_a_layer_that_leaves_its_weights_to_torch_is_refused(small: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError) as error:
        build_with(Gate(), small, monkeypatch)
    assert str(error.value) == (
        "Gate has parameters but no method init_weights(self, output_scale), which draws the weights that training "
        "starts from (docs/layers.md)"
    )


def test_a_layer_draws_its_own_weights(small: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their names: these are of the weights of attention and dense."""
    layer = InitialisedGate()
    layer.qkv, layer.down = layer.gate, layer.gate
    build_with(layer, replace(small, replaced=[1]), monkeypatch)
    assert torch.equal(layer.gate.weight, torch.full((8, 8), 0.5)), "1 / sqrt(2 x 2 layers)"
    empty = nn.Tanh()  # has nothing to draw
    assert build_with(empty, small, monkeypatch).blocks[0].ffn is empty


def test_a_dense_layer_may_start_with_a_smaller_output() -> None:
    outputs = []
    for scale in (1.0, 0.25):
        torch.manual_seed(0)
        layer = build_model(load(["ffn=dense", "d_model=16", f"ffn.initial_output_scale={scale}"])).blocks[1].ffn
        outputs.append(layer(torch.linspace(-1, 1, 32).reshape(1, 2, 16)))
    torch.testing.assert_close(outputs[1], outputs[0] / 4)


def test_no_layer_adds_nothing_and_hands_back_a_gradient() -> None:
    layer, x = NoLayer(), torch.ones(2, 3, requires_grad=True)
    layer(x).sum().backward()
    assert not layer(x).any() and x.grad is not None and not x.grad.any()
