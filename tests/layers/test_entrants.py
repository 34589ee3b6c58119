"""The entrants of the comparison: their definitions token by token, what they cost, and what each part of them does."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import per_token
import per_token_entrants as entrants
from peerscale.api import build_model, cost, load
from peerscale.layers.balanced_moe import BalancedMoeConfig
from peerscale.layers.base import FfnConfig, Surroundings
from peerscale.layers.engram import EngramConfig
from peerscale.layers.memory_plus import MemoryPlusConfig
from peerscale.layers.relu_squared import ReluSquaredConfig
from peerscale.layers.swiglu import SwigluConfig
from peerscale.model.transformer import Transformer
from peerscale.ops.backends import choose_operators
from peerscale.train.optimizer import parameter_groups
from per_token_entrants import primes

MODEL = ("d_model=16", "n_layers=4", "replaced=[2,4]", "data.vocab_size=257", "context=8", "head_dim=8")
SETTINGS = {
    "swiglu": (), "relu_squared": (), "balanced_moe": ("ffn.n_experts=7", "ffn.n_shared=2", "ffn.top_k=3"),
    "memory_plus": ("ffn.n_experts=64", "ffn.n_heads=2", "ffn.top_k=3"),
    "engram": ("ffn.n_hashes=2", "ffn.n_rows=11", "ffn.d_row=3"),
}  # fmt: skip
Moe = partial(BalancedMoeConfig, n_experts=6, n_shared=2, top_k=3, granularity=4)
Memory = partial(MemoryPlusConfig, n_experts=16, n_heads=3, top_k=3, d_key=4)
Engram = partial(EngramConfig, n_hashes=2, n_rows=11, d_row=3, kernel=2, dilation=2)
VOCABULARY = 200_000


def around(d_model: int = 6, kernel: str = "reference") -> Surroundings:
    operators = choose_operators(kernel)
    return Surroundings(d_model=d_model, d_ff=4 * d_model, group_sequences=3, operators=operators)


def make(config: FfnConfig, kernel: str = "reference") -> nn.Module:
    """In float64, with all parts of the layer at work."""
    torch.manual_seed(0)
    layer = config.build(around(kernel=kernel))
    layer.init_weights(0.35)
    return entrants.unlike_new(layer).double()


def inputs(sequences: int = 3, tokens: int = 7) -> tuple[Tensor, Tensor]:
    x_BTD = torch.randn(sequences, tokens, 6, dtype=torch.float64)
    return x_BTD, torch.randint(VOCABULARY, (sequences, tokens))


FORMS = [
    SwigluConfig(), ReluSquaredConfig(), Moe(), Moe(top_k=6, n_shared=1), Memory(), Memory(gate=False), Engram(),
    Engram(orders=(1, 4), n_hashes=1, n_rows=3, kernel=4, dilation=1), Engram(orders=(3, 2), kernel=1),
    Engram(orders=(3,), n_rows=1, kernel=4, dilation=3),
]  # fmt: skip


@pytest.mark.parametrize("config", FORMS, ids=lambda config: config.method)
@pytest.mark.parametrize("kernel", ["reference", "torch"])
def test_is_its_definition_token_by_token(config: FfnConfig, kernel: str) -> None:
    layer, (x, tokens) = make(config, kernel), inputs()
    if config.method == "engram":
        layer.forward = partial(layer.forward, tokens_BT=tokens)

    def loop(layer: nn.Module, x: Tensor) -> Tensor:
        one = getattr(entrants, config.method)
        return torch.stack([one(layer, x, config, ids) for x, ids in zip(x, tokens.tolist(), strict=True)])

    per_token.assert_equal_with_gradients(layer, loop, x)


def test_engrams_hashes_are_odd_different_in_every_table_and_kept_with_the_weights() -> None:
    first, second = Engram().build(around()), Engram().build(around())
    assert len(first.table) == sum(primes(11, 4))
    numbers = [n for layer in (first, second) for n in layer.factors_LJ.flatten().tolist() if n]
    assert all(n % 2 == 1 and n * (VOCABULARY + 1) < 2**63 for n in numbers)
    assert len({*numbers}) == 2 * (2 * 2 + 2 * 3), "two tables each for pairs and triples"
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.factors_LJ, first.factors_LJ)


def configured(ffn: str, *overrides: str):
    return load([f"ffn={ffn}", *MODEL, *SETTINGS[ffn], *overrides])


def layers_of(model: Transformer) -> list[nn.Module]:
    return [block.before or block.ffn for block in (model.blocks[1], model.blocks[3])]


def built(ffn: str, *overrides: str) -> Transformer:
    torch.manual_seed(0)
    model = build_model(configured(ffn, *overrides))
    for layer in layers_of(model):
        entrants.unlike_new(layer)
    return model.double()


@pytest.mark.parametrize("ffn", SETTINGS)
def test_no_logit_depends_on_a_later_token(ffn: str) -> None:
    model, before = built(ffn, "trainer.kernel=torch"), torch.randint(257, (4, 8))
    with torch.no_grad():
        for changed in (1, 5, 7):
            after = before.clone()
            after[:, changed] = (after[:, changed] + 1) % 257
            difference = (model(after) - model(before)).abs().amax(dim=(0, 2))
            assert difference[:changed].max() < 1e-12 and difference[changed:].min() > 1e-6


def ungate(layer: nn.Module) -> None:
    nn.init.zeros_(layer.gate_in.weight)
    nn.init.constant_(layer.gate_in.bias, 1.2784645427610738)  # whose silu is 1


def forget_order(layer: nn.Module, second: bool) -> None:
    for projection in (layer.key, layer.value):
        nn.init.zeros_(projection.weight.chunk(2, dim=1)[second])


PARTS = {
    "swiglu": {"gate": lambda layer: nn.init.zeros_(layer.gate.weight)},
    "balanced_moe": {
        "router": lambda layer: nn.init.zeros_(layer.router.weight),
        "balance bias": lambda layer: nn.init.zeros_(layer.bias_E),
        "routed experts": lambda layer: nn.init.zeros_(layer.experts.down),
        "gates of experts": lambda layer: nn.init.ones_(layer.experts.gate),
        "shared experts": lambda layer: nn.init.zeros_(layer.shared.down.weight),
    },
    "memory_plus": {
        "gate": ungate,
        "values": lambda layer: nn.init.zeros_(layer.values),
        "sharing of values": lambda layer: setattr(layer, "values", layer.new_table(16)),
    },
    "engram": {
        "pairs": partial(forget_order, second=False),
        "triples": partial(forget_order, second=True),
        "gate": lambda layer: nn.init.zeros_(layer.norm_x.weight),
        "convolution": lambda layer: nn.init.zeros_(layer.convolution.weight),
        "tables": lambda layer: nn.init.zeros_(layer.table),
    },
}


@pytest.mark.parametrize(("ffn", "part"), [(ffn, part) for ffn, parts in PARTS.items() for part in parts])
def test_every_part_moves_the_loss(ffn: str, part: str) -> None:
    model, tokens = built(ffn, "trainer.kernel=torch"), torch.randint(257, (4, 9))

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:])

    with torch.no_grad():
        whole = loss()
        PARTS[ffn][part](layers_of(model)[1])
        assert (model.double() and loss() - whole).abs() > 1e-4


@pytest.mark.parametrize("ffn", ["memory_plus", "engram"])
def test_tables_are_trained_as_tables_once(ffn: str) -> None:
    tables = parameter_groups(built(ffn)).tables
    wanted = [(64, 16)] if ffn == "memory_plus" else [(sum(primes(11, 4)), 3)] * 2
    assert [tuple(table.shape) for table in tables] == wanted


def by_hand(c: FfnConfig, D: int) -> tuple[int, int, int]:
    """The authors' parameters and FLOPs per token of one layer, and its parameters that one token does not use."""
    if c.method in ("swiglu", "relu_squared"):
        matrices, F = (3, 8 * round(D / 3)) if c.method == "swiglu" else (2, 4 * D)
        return matrices * D * F, 2 * matrices * D * F, 0
    if c.method == "balanced_moe":
        E, F, used = c.n_experts, 8 * round(D / 3 / c.granularity), c.top_k + c.n_shared
        return D * E + 3 * D * F * (E + c.n_shared), 2 * D * E + 6 * D * F * used, 3 * D * F * (E - c.top_k)
    if c.method == "memory_plus":
        N, h, k, n, d_k = c.n_experts, c.n_heads, c.top_k, round(c.n_experts**0.5), D // 2
        params, biases = D * h * d_k + h * n * d_k + N * D + 2 * D**2, h * d_k + 2 * D
        return params + biases, 2 * D * h * d_k + 2 * h * n * d_k + 2 * h * k * D + 4 * D**2, (N - h * k) * D
    n_tables = len(c.orders) * c.n_hashes
    d_memory, slots = n_tables * c.d_row, sum(primes(c.n_rows, n_tables))
    params = slots * c.d_row + 2 * d_memory * D + c.kernel * D + 3 * D  # the last two: convolution and norms
    return params, 4 * d_memory * D + 2 * c.kernel * D, (slots - n_tables) * c.d_row


@pytest.mark.parametrize("ffn", SETTINGS)
def test_parameters_and_flops_are_those_of_the_built_model_and_of_the_papers(ffn: str) -> None:
    model, priced = built(ffn, "trainer.kernel=reference"), cost(configured(ffn))
    params, flops, unused = by_hand(configured(ffn).ffn, 16)
    dense = (4 if ffn == "engram" else 2) * 2 * 16 * 64
    shared = 64 * 16 if ffn == "memory_plus" else 0
    total = 257 * 16 + 4 * 4 * 16**2 + 9 * 16 + dense + 2 * params - shared
    assert priced.params_total == sum(p.numel() for p in model.parameters()) == total
    assert priced.params_active == total + shared - 2 * unused
    assert priced.layer_flops == 3 * 2 * flops
    if ffn != "balanced_moe":  # the counter does not see its products
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.randint(257, (4, 8)))
        assert 3 * counter.get_total_flops() == 4 * 8 * priced.flops_per_token
    assert priced.flops_per_token == 3 * 2 * (257 * 16 + 4 * 4 * 16**2 + 4 * 2 * 8 * 16 + dense + flops)


def test_costs_are_those_that_the_authors_state() -> None:
    # DeepSeek-V3: 671B parameters, 37B of them active. 58 of 61 layers are mixtures; the rest of its model by hand:
    D, attention = 7168, 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168
    rest = 61 * attention + 3 * 3 * D * 18432 + 2 * 129280 * D
    mixture = BalancedMoeConfig(n_experts=256, n_shared=1, top_k=8, granularity=6)  # experts of 18432 / 9 = 2048
    priced = mixture.cost(replace(around(D), d_ff=18432))
    total = 58 * sum(priced.params.values()) + rest
    assert total == pytest.approx(671e9, rel=1e-3)
    assert total - 58 * priced.inactive == pytest.approx(37e9, rel=0.02)
    # Memory layers at scale: 128B parameters in one table of 2^26 values for the 1.3B model, d_model 2048.
    memory = MemoryPlusConfig(n_experts=2**26, n_heads=4, top_k=32).cost(around(2048))
    assert memory.shared["experts"] == 128 * 2**30
    # Engram-27B and -40B: 5.7B and 18.5B parameters in tables before two layers, 1280 numbers a token of 16 tables.
    for n_rows, billions in ((2_262_400, 5.7), (7_239_680, 18.5)):
        tables = EngramConfig(n_hashes=8, n_rows=n_rows, d_row=80).cost(around(2560)).params["tables"]
        assert 2 * tables / 1e9 == pytest.approx(billions, rel=0.02)
    # Shazeer 2020: 3072 hidden units of T5 become 2048 with a gate, at equal parameters and computation.
    assert SwigluConfig().d_hidden(around(768)) == 2048


def test_costs_at_the_sizes_of_the_papers() -> None:
    in_373m = MemoryPlusConfig(n_experts=1024**2, n_heads=4, top_k=32)
    mixture = BalancedMoeConfig(n_experts=31, n_shared=1, top_k=3, granularity=4)
    one, many = (EngramConfig(n_hashes=8, n_rows=rows, d_row=80) for rows in (1, 100))
    for config, d_model in ((in_373m, 1024), (mixture, 768), (one, 2560), (many, 2560)):
        params, flops, unused = by_hand(config, d_model)
        priced = config.cost(around(d_model))
        assert (sum(priced.params.values()), priced.inactive) == (params, unused)
        assert sum(priced.forward_flops.values()) == flops
    for config, router in ((SwigluConfig(), 0), (ReluSquaredConfig(), 0), (mixture, 2 * 768 * 31)):
        assert sum(config.cost(around(768)).forward_flops.values()) == 16 * 768**2 + router


def test_blocks_of_memory_plus_share_their_values_and_nothing_else() -> None:
    for on in (True, False):
        first, second = layers_of(built("memory_plus", f"ffn.shared_values={str(on).lower()}"))
        same = [name for name, p in first.named_parameters() if p is dict(second.named_parameters())[name]]
        assert same == ["values"] * on
        x = torch.randn(1, 5, 16, dtype=torch.float64)
        old = second(x)
        nn.init.zeros_(first.values)
        assert torch.allclose(second(x), old, atol=1e-3) != on


def test_biases_move_by_the_loads_of_the_passes_since_the_last_step() -> None:
    layer = make(Moe(balance_rate=0.01))
    bias = layer.bias_E.tolist()
    for _ in range(3):
        batches = [inputs()[0], inputs()[0]]
        chosen = [e for x in torch.cat(batches).flatten(0, 1) for e in entrants.scores_and_chosen(layer, x, 3)[1]]
        counts = [chosen.count(e) for e in range(6)]
        for x in batches:
            layer.train()(x)
            layer.eval()(5 * x + 1)  # does not count
        assert layer.bias_E.tolist() == bias and layer.load_E.tolist() == counts, "nothing moves before the step"
        layer.train().after_step()
        moved = [
            b + 0.01 * ((n < 21) - (n > 21)) for b, n in zip(bias, counts, strict=True)
        ]  # the mean of 2 x 21 x 3 / 6
        bias = layer.bias_E.tolist()
        assert bias == pytest.approx([b - sum(moved) / 6 for b in moved], abs=1e-12)
        assert abs(sum(bias)) < 1e-12 and not layer.load_E.any()
    layer.after_step()
    assert layer.bias_E.tolist() == pytest.approx(bias, abs=1e-12), "no loads, no move"


def test_an_overloaded_expert_gets_fewer_tokens_after_some_steps() -> None:
    layer, x, loads = make(Moe(top_k=2, balance_rate=0.02)), inputs()[0].abs(), []
    nn.init.zeros_(layer.bias_E)
    nn.init.ones_(layer.router.weight[1])
    for _ in range(40):
        layer(x)
        loads.append(layer.load_E.clone())
        layer.after_step()
    spread = [load.max() - load.min() for load in loads]
    assert loads[0][1] == 21 and loads[-1][1] < 14 and sum(spread[-10:]) < sum(spread[:10]) / 2


def test_the_bias_chooses_but_does_not_weigh_and_the_shared_experts_are_added() -> None:
    layer, x = make(Moe()), inputs()[0]
    y = []
    for bias in ([4.0, -4.0, 4.0, 4.0, -4.0, -4.0], [9.0, -9.0, 5.0, 4.0, -4.0, -5.0], [0.0] * 6):
        layer.bias_E.copy_(torch.tensor(bias))
        y.append(layer(x))
    torch.testing.assert_close(y[0], y[1])
    assert not torch.allclose(y[0], y[2], atol=1e-3)
    shared = layer.shared(x)
    nn.init.zeros_(layer.shared.down.weight)
    torch.testing.assert_close(layer(x), y[2] - shared)
    assert shared.abs().max() > 1e-2
    assert "bias_E" in layer.state_dict() and "bias_E" not in dict(layer.named_parameters())


def test_the_gate_of_memory_plus_weighs_what_it_retrieves() -> None:
    layer, bare, x = make(Memory()), make(Memory(gate=False)), inputs()[0]
    bare.load_state_dict({name: layer.state_dict()[name] for name in bare.state_dict()})
    assert not torch.allclose(layer(x), bare(x), atol=1e-2)
    nn.init.zeros_(layer.gate_in.weight)
    nn.init.constant_(layer.gate_in.bias, 1.2784645427610738)  # whose silu is 1
    nn.init.eye_(layer.gate_out.weight)
    nn.init.zeros_(layer.gate_out.bias)
    torch.testing.assert_close(layer(x), bare(x))


def test_engram_reads_the_tokens_that_its_orders_and_its_convolution_reach() -> None:
    layer, (x, tokens) = make(Engram(n_rows=1009, kernel=3, dilation=4)), inputs(1, 14)
    for lags in ([0, 1, 2, 4, 5, 6, 8, 9, 10], [0, 1, 2]):
        changed = [tokens + torch.eye(14, dtype=torch.long)[-1 - lag] for lag in range(14)]
        apart = [(layer(x, other) - layer(x, tokens))[0, -1].abs().max() > 1e-12 for other in changed]
        assert [lag for lag in range(14) if apart[lag]] == lags
        nn.init.zeros_(layer.convolution.weight)


@pytest.mark.parametrize("n_rows", [1, 1009])
def test_engram_depends_on_x_by_its_gate_alone_and_with_one_row_not_on_the_tokens(n_rows: int) -> None:
    layer, (x, tokens) = make(Engram(n_rows=n_rows)), inputs()
    nn.init.zeros_(layer.convolution.weight)
    u = layer(x, tokens)
    assert torch.allclose(u, layer(x, tokens.flip(1))) == (n_rows == 1)
    nn.init.zeros_(layer.norm_x.weight)
    assert not torch.allclose(layer(x, tokens), u, atol=1e-3)
    places = [(t, row) for row in tokens.tolist() for t in range(7)]
    memory = torch.stack([entrants.engram_memory(layer, t, Engram(n_rows=n_rows), row) for t, row in places])
    torch.testing.assert_close(layer(-2 * x, tokens).flatten(0, 1), memory @ layer.value.weight.T / 2)
