import cmath
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import per_token
from peerscale.config.schema import load
from peerscale.layers import Peer, Pkm
from peerscale.layers.dense import Dense
from peerscale.layers.fine_grained_moe import FineGrainedMoe
from peerscale.layers.moe import ExpertChoiceMoe, TokenChoiceMoe
from peerscale.model.build import build_model
from peerscale.model.transformer import Attention, Transformer

KINDS = {
    "dense": Dense,
    "wide_dense": Dense,
    "moe": ExpertChoiceMoe,
    "moe_token_choice": TokenChoiceMoe,
    "fine_grained_moe": FineGrainedMoe,
    "pkm": Pkm,
    "pkm_equal_top_k": Pkm,
    "peer": Peer,
}
SMALL = ("d_model=8", "head_dim=4", "n_layers=2", "data.vocab_size=257", "context=6", "batch_sequences=16")


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Zhang and Sennrich 2019."""
    return x / torch.sqrt(x.square().mean() + torch.finfo(x.dtype).eps) * weight


def rotated(x: Tensor, position: int) -> Tensor:
    """Su et al. 2021: the pair (i, i + C/2), as a complex number, turned by position x 10000^(-2i/C)."""
    half = len(x) // 2
    turns = [cmath.exp(1j * position * 10_000 ** (-2 * i / len(x))) for i in range(half)]
    turned = torch.complex(x[:half], x[half:]) * torch.tensor(turns, dtype=torch.complex128)
    return torch.cat([turned.real, turned.imag])


def attention(layer: Attention, x_TD: Tensor) -> Tensor:
    """Every token and head by itself over its past (Vaswani et al. 2017, equation 1)."""
    T, D = x_TD.shape
    C = D // layer.n_heads
    q, k, v = ((x_TD @ w.T) for w in layer.qkv.weight.split(D))
    y = []
    for t in range(T):
        heads = []
        for h in range(layer.n_heads):
            part = slice(h * C, (h + 1) * C)
            scores = [rotated(q[t, part], t) @ rotated(k[s, part], s) / math.sqrt(C) for s in range(t + 1)]
            weights = per_token.softmax(torch.stack(scores))
            heads.append(sum(w * v[s, part] for s, w in enumerate(weights)))
        y.append(layer.out.weight @ torch.cat(heads))
    return torch.stack(y)


def logits(model: Transformer, tokens_T: Tensor) -> Tensor:
    """One sequence through the dense transformer."""
    x = model.embedding.weight[tokens_T]
    for block in model.blocks:
        x = x + attention(block.attention, torch.stack([rms_norm(row, block.attention_norm.weight) for row in x]))
        x = x + per_token.dense(block.ffn, torch.stack([rms_norm(row, block.ffn_norm.weight) for row in x]))
    return torch.stack([model.embedding.weight @ rms_norm(row, model.norm.weight) for row in x])


def shaken(model: Transformer) -> Transformer:
    """In float64, the rotary tables too, with norms that are not all ones, in which mistakes would hide."""
    torch.manual_seed(1)
    model = model.double()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


@pytest.mark.parametrize("kernel", ["torch", "cpp"])
def test_more_tokens_than_the_context_are_refused(kernel: str) -> None:
    model = build_model(load(["ffn=dense", *SMALL, f"trainer.kernel={kernel}"]))
    assert model(torch.zeros(1, 6, dtype=torch.long)).isfinite().all()
    with pytest.raises(ValueError, match=r"^7 tokens are more than the context of 6$"):
        model(torch.zeros(1, 7, dtype=torch.long))


def test_is_the_textbook_transformer_token_by_token() -> None:
    model = shaken(build_model(load(["ffn=dense", *SMALL])))
    tokens_BT = torch.randint(257, (2, 6))
    wanted = torch.stack([logits(model, tokens_T) for tokens_T in tokens_BT])
    got = model(tokens_BT)
    # The rotary tables are kept in fp32, which is all the precision that a bf16 or fp32 run can use.
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    upstream = torch.randn_like(wanted)
    parameters = dict(model.named_parameters())
    for name, a, b in zip(
        parameters,
        torch.autograd.grad(got, list(parameters.values()), upstream),
        torch.autograd.grad(wanted, list(parameters.values()), upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"gradient of {name}: {m}")


def test_dense_is_two_products_and_a_gelu() -> None:
    per_token.assert_equal_with_gradients(Dense(5, 20), per_token.dense, torch.randn(4, 5))


def test_a_shorter_sequence_is_a_prefix() -> None:
    model = shaken(build_model(load(["ffn=dense", *SMALL])))
    tokens = torch.randint(257, (1, 6))
    torch.testing.assert_close(model(tokens[:, :4]), model(tokens)[:, :4])


@pytest.mark.parametrize("ffn", KINDS)
def test_the_layer_under_study_is_in_the_replaced_blocks(ffn: str) -> None:
    base = load([f"ffn={ffn}", *SMALL])
    for replaced, n_layers, blocks in (
        ("middle", 12, {6}),
        ("middle", 4, {2}),
        ("middle", 5, {2}),
        ("middle", 1, {1}),
        ("all", 3, {1, 2, 3}),
        ([3, 1], 3, {1, 3}),
    ):
        with torch.device("meta"):
            model = build_model(replace(base, n_layers=n_layers, replaced=replaced))
        kinds = {i: type(block.ffn) for i, block in enumerate(model.blocks, 1)}
        assert kinds == {i: KINDS[ffn] if i in blocks else Dense for i in range(1, n_layers + 1)}


def built(ffn: str, *overrides: str) -> nn.Module:
    return build_model(load([f"ffn={ffn}", *SMALL, *overrides])).blocks[0].ffn


def test_the_layer_gets_every_setting_of_its_configuration() -> None:
    common = {"n_experts": "64", "n_heads": "3", "top_k": "5", "d_key": "10"}
    switches = {"query_norm": "false", "query_bias": "false", "shared_keys": "false"}
    forms = {"activation": "relu", "score": "sigmoid"}
    set_all = [f"++ffn.{key}={value}" for key, value in {**common, **switches, **forms}.items()]
    for name in ("peer", "pkm"):
        overrides = [o for o in set_all if name == "peer" or o.split("=")[0][6:] not in forms]
        layer = built(name, *overrides)
        assert layer.sub_keys.shape == (3, 2, 8, 5)
        assert (layer.n_experts, layer.n_heads, layer.top_k) == (64, 3, 5)
        assert layer.query.bias is None and layer.query_norm is None
        if name == "peer":
            assert (layer.activation, layer.score) == ("relu", "sigmoid")
    sizes = ["ffn.n_experts=6", "ffn.top_k=2", "++ffn.load_balance_weight=0.5"]
    token = built("moe_token_choice", *sizes, "++ffn.z_loss_weight=0.25")
    assert (token.n_experts, token.top_k, token.config.load_balance_weight, token.z_loss_weight) == (6, 2, 0.5, 0.25)
    layer = built("fine_grained_moe", *sizes, "ffn.n_shared=3", "ffn.granularity=8")
    assert (layer.n_experts, layer.top_k, layer.config.load_balance_weight, layer.z_loss_weight) == (6, 2, 0.5, 0)
    assert layer.experts.up.shape == (6, 8, 4) and layer.shared.up.weight.shape == (12, 8)
    choice = built("moe", "ffn.n_experts=8", "ffn.capacity_factor=2")
    assert (choice.n_experts, choice.config.capacity_factor) == (8, 2)


class Around(nn.Module):
    """A layer that passes on the auxiliary loss of its part."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    @property
    def auxiliary_loss(self) -> Tensor:
        return self.part.auxiliary_loss

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)


def test_auxiliary_losses_of_all_layers_are_summed() -> None:
    model = build_model(load(["ffn=moe_token_choice", *SMALL, "replaced=all"]))
    assert model.auxiliary_loss() is None
    model(torch.randint(257, (2, 6)))
    losses = [block.ffn.auxiliary_loss.item() for block in model.blocks]
    assert len(losses) == 2 and min(losses) > 0
    assert model.auxiliary_loss().item() == pytest.approx(sum(losses))
    model.blocks[0].ffn = Around(model.blocks[0].ffn)
    assert model.auxiliary_loss().item() == pytest.approx(sum(losses)), "a loss that is passed on counts once"
    dense = build_model(load(["ffn=dense", *SMALL]))
    dense(torch.randint(257, (2, 6)))
    assert dense.auxiliary_loss() is None


@pytest.mark.parametrize("ffn", ["dense", "moe", "fine_grained_moe"])
def test_starts_with_the_documented_variances(ffn: str) -> None:
    torch.manual_seed(0)
    model = build_model(load([f"ffn={ffn}", "d_model=128", "n_layers=2", "data.vocab_size=512", "replaced=all"]))
    attention, layer = model.blocks[1].attention, model.blocks[1].ffn
    wide, half = 512**-0.5, 1 / 2  # 1 / sqrt(2 x 2 layers)
    wanted = {
        model.embedding.weight: 128**-0.5,
        attention.qkv.weight: 128**-0.5,
        attention.out.weight: 128**-0.5 * half,
    }
    if ffn != "dense":  # every expert starts as a dense layer
        width = {"moe": 512, "fine_grained_moe": 128}[ffn]
        wanted |= {layer.experts.up: 128**-0.5, layer.experts.down: width**-0.5 * half}
    if ffn != "moe":
        part = layer if ffn == "dense" else layer.shared
        wanted |= {part.up.weight: 128**-0.5, part.down.weight: (wide if ffn == "dense" else 128**-0.5) * half}
    for weight, std in wanted.items():
        assert weight.std().item() == pytest.approx(std, rel=0.03)
        assert weight.mean().item() == pytest.approx(0, abs=0.03 * std)


@pytest.mark.parametrize("ffn", KINDS)
def test_an_untrained_model_knows_nothing(ffn: str) -> None:
    torch.manual_seed(0)
    model = build_model(load([f"ffn={ffn}", "d_model=32", "data.vocab_size=300", "context=16"]))
    tokens = torch.randint(300, (16, 17))
    loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).item()
    # Logits of a tied head have the variance of about 1 that costs half a nat over the even guess.
    assert math.log(300) - 0.1 < loss < math.log(300) + 1.0


@pytest.mark.parametrize("ffn", KINDS)
def test_every_parameter_is_trained(ffn: str) -> None:
    torch.manual_seed(0)
    model = build_model(load([f"ffn={ffn}", *SMALL, "replaced=all"]))
    tokens = torch.randint(257, (16, 6))
    loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(-1).flatten())
    loss = loss if model.auxiliary_loss() is None else loss + model.auxiliary_loss()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
