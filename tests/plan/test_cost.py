"""Parameters and FLOPs from the configuration, against the built model and torch's own counter."""

import functools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from peerscale.config.schema import Config, load
from peerscale.files import ROOT
from peerscale.layers.dense import WideDenseConfig
from peerscale.model.build import build_model
from peerscale.model.transformer import Transformer
from peerscale.plan.cost import cost

FFNS = sorted(path.stem for path in (ROOT / "conf/ffn").glob("*.yaml"))

SHAPES = {
    "small": ("d_model=8", "data.vocab_size=257", "context=5"),
    "deep": ("d_model=20", "n_layers=5", "data.vocab_size=300", "context=9"),
    "all": ("d_model=24", "n_layers=3", "data.vocab_size=311", "context=7", "replaced=all"),
    "two": ("d_model=12", "n_layers=4", "data.vocab_size=257", "context=4", "replaced=[1,4]", "batch_sequences=32"),
}

VARIANTS = {
    "peer": ["peer", "++ffn.shared_keys=false", "++ffn.query_norm=false", "++ffn.query_bias=false"],
    "wide keys": ["peer", "++ffn.d_key=30", "ffn.n_heads=3", "ffn.top_k=5", "ffn.n_experts=144"],
    "pkm": ["pkm", "++ffn.shared_keys=false", "ffn.n_experts=1225", "ffn.top_k=7", "++ffn.query_bias=false"],
    "moe": ["moe", "ffn.n_experts=8", "ffn.capacity_factor=2"],
    "half capacity": ["moe", "ffn.n_experts=4", "ffn.capacity_factor=0.5"],
    "token choice": ["moe_token_choice", "ffn.n_experts=5", "ffn.top_k=3"],
    "fine-grained": ["fine_grained_moe", "ffn.n_experts=7", "ffn.top_k=2", "ffn.n_shared=3", "ffn.granularity=6"],
    "swiglu elsewhere": ["peer", "dense=swiglu"],
    "relu squared elsewhere": ["engram", "dense=relu_squared"],
    "wide as moe": ["wide_dense", "~ffn.params_of", "+ffn.params_of={method:moe,n_experts:5}"],
    "wide as pkm": ["wide_dense", "ffn.params_of.method=pkm", "++ffn.params_of.d_key=30"],
}

CASES = [
    *(pytest.param([ffn, *shape], id=f"{ffn}-{name}") for ffn in FFNS for name, shape in SHAPES.items()),
    *(pytest.param([*variant, *SHAPES["two"]], id=f"variant-{name}") for name, variant in VARIANTS.items()),
]

GROUPS = {
    "embedding": r"embedding\.weight",
    "attention": r"blocks\.\d+\.attention\.(qkv|out)\.weight",
    "norms": r"(blocks\.\d+\.(attention|ffn)_)?norm\.weight|blocks\.\d+\.before\.norm_\w+\.weight",
    "ffn": r"blocks\.\d+\.ffn\.(gate|down|up)\.weight",
    "router": r"blocks\.\d+\.ffn\.router\.weight",
    "experts": r"blocks\.\d+\.ffn\.(experts\.(gate|down|up)|w_down|w_up|values)",
    "shared_experts": r"blocks\.\d+\.ffn\.shared\.(gate|down|up)\.weight",
    "gate": r"blocks\.\d+\.ffn\.gate_(in|out)\.(weight|bias)",
    "tables": r"blocks\.\d+\.before\.table",
    "projections": r"blocks\.\d+\.before\.(key|value)\.weight",
    "convolution": r"blocks\.\d+\.before\.convolution\.weight",
    "query": r"blocks\.\d+\.ffn\.query\.(weight|bias)",
    "query_norm": r"blocks\.\d+\.ffn\.query_norm\.(weight|bias)",
    "sub_keys": r"blocks\.\d+\.ffn\.sub_keys",
}


@functools.cache
def configured(*overrides: str) -> Config:
    # The reference kernel, whose einsums the counter sees; it does not see torch's embedding bags.
    return load([f"ffn={overrides[0]}", "trainer.kernel=reference", *overrides[1:]])


@pytest.mark.parametrize("overrides", CASES)
def test_parameters_are_the_built_models_by_group(overrides: list[str]) -> None:
    config = configured(*overrides)
    with torch.device("meta"):
        model = build_model(config)
    counted: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        (group,) = [group for group, pattern in GROUPS.items() if re.fullmatch(pattern, name)]
        counted[group] += parameter.numel()
    priced = cost(config)
    assert {group: n for group, n in priced.params.items() if n} == counted
    assert priced.params_total == counted.total()


def forward_flops(model: Transformer, config: Config) -> FlopCounterMode:
    """Count one pass over a batch. Attention is run as plain products, as the counter misses the CPU's fused one."""
    tokens = torch.randint(config.data.vocab_size, (config.batch_sequences, config.context))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens)
    return counter


def by_component(counter: FlopCounterMode, config: Config) -> Iterator[tuple[str, int]]:
    """The counter's numbers, which are by module, by the components that a module tells apart."""
    modules = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    blocks = [name for name in modules if re.fullmatch(r"Transformer\.blocks\.\d+", name)]
    for i, block in enumerate(sorted(blocks), 1):
        qkv, out = modules[f"{block}.attention.qkv"], modules[f"{block}.attention.out"]
        yield "qkv", qkv
        yield "attention_out", out
        yield "attention_scores + attention_values", modules[f"{block}.attention"] - qkv - out
        replaced = i in config.replaced_blocks and config.ffn.place == "feed_forward"
        yield "layer" if replaced else "ffn", modules.get(f"{block}.ffn", 0)  # none of no layer
        yield "layer", modules.get(f"{block}.before", 0) + modules.get(f"{block}.beside", 0)
    yield "logits", modules["Global"] - sum(modules[block] for block in blocks)


@pytest.mark.parametrize("overrides", CASES)
def test_flops_are_what_torch_counts(overrides: list[str]) -> None:
    config = configured(*overrides)
    priced = cost(config)
    torch.manual_seed(0)
    model = build_model(config).double()  # as the counter misses torch's grouped product, which takes no float64
    counted: Counter[str] = Counter()
    for component, flops in by_component(forward_flops(model, config), config):
        counted[component] += flops
    tokens = config.batch_sequences * config.context
    assert 3 * counted.total() == priced.flops_per_token * tokens
    assert 3 * counted["layer"] == priced.layer_flops * tokens
    assert priced.layer_share == pytest.approx(counted["layer"] / counted.total())
    attention = priced.flops["attention_scores"] + priced.flops["attention_values"]
    assert 3 * counted["attention_scores + attention_values"] == attention * tokens
    for component in ("qkv", "attention_out", "logits"):
        assert 3 * counted[component] == priced.flops[component] * tokens
    if "ffn" not in config.ffn.cost(config.surroundings).forward_flops:
        assert 3 * counted["ffn"] == priced.flops["ffn"] * tokens


@pytest.mark.parametrize("ffn", ["dense", "moe", "pkm", "peer"])
def test_backward_is_twice_forward(ffn: str) -> None:
    config = configured(ffn, *SHAPES["all"])
    model = build_model(config)
    tokens = torch.randint(config.data.vocab_size, (config.batch_sequences, config.context))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    assert counter.get_total_flops() == cost(config).flops_per_token * config.batch_sequences * config.context


def test_components_of_a_retrieval_layer_are_the_papers() -> None:
    # 2 d h d_k for the queries, 2 h sqrt(N) d_k for the sub-keys, 4 h k d for the experts of PEER and half for PKM's
    # values, at the paper's own sizes but the width.
    sizes = ["d_model=256", "ffn.n_experts=1048576", "ffn.n_heads=8", "++ffn.d_key=128"]
    peer, pkm = cost(load(["ffn=peer", "ffn.top_k=16", *sizes])), cost(load(["ffn=pkm", "ffn.top_k=32", *sizes]))
    for priced in (peer, pkm):
        assert priced.flops["query"] == 3 * 2 * 256 * 8 * 128
        assert priced.flops["sub_keys"] == 3 * 2 * 8 * 1024 * 128
        assert priced.flops["experts"] == 3 * 4 * 8 * 16 * 256
    assert peer.params["experts"] == 2 * 1024**2 * 256
    assert pkm.params["experts"] == 1024**2 * 256


def gradient_rows(table: nn.Parameter) -> int:
    """Rows that a pass touched."""
    return int((table.grad.flatten(1) != 0).any(-1).sum())


@pytest.mark.parametrize("ffn", ["peer", "pkm"])
def test_active_parameters_are_those_that_one_token_trains(ffn: str) -> None:
    config = load([f"ffn={ffn}", *SHAPES["all"], "ffn.n_heads=2", "ffn.top_k=3", "++ffn.shared_keys=false"])
    torch.manual_seed(0)
    model = build_model(config).eval()
    model(torch.zeros(1, 1, dtype=torch.long)).square().sum().backward()
    untouched = 0
    for block in model.blocks:
        for table in block.ffn.expert_tables():
            assert gradient_rows(table) == 6, "two heads met: choose another seed"
            untouched += (len(table) - 6) * table.shape[1]
    assert cost(config).params_active == sum(p.numel() for p in model.parameters()) - untouched


@pytest.mark.parametrize("ffn", ["moe_token_choice", "fine_grained_moe"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_active_parameters_of_token_choice(ffn: str, top_k: int) -> None:
    config = load([f"ffn={ffn}", *SHAPES["all"], f"ffn.top_k={top_k}", "ffn.n_experts=6"])
    model = build_model(config)
    model(torch.zeros(1, 1, dtype=torch.long)).square().sum().backward()
    untouched = 0
    for block in model.blocks:
        for table in (block.ffn.experts.up, block.ffn.experts.down):
            assert gradient_rows(table) == top_k
            untouched += (6 - top_k) * table[0].numel()
    assert cost(config).params_active == sum(p.numel() for p in model.parameters()) - untouched


def test_active_parameters_of_expert_choice_are_those_of_the_mean_token() -> None:
    dense = cost(load(["ffn=dense"]))
    router = 32 * 16
    once, twice = (cost(load(["ffn=moe", "ffn.n_experts=16", f"ffn.capacity_factor={n}"])) for n in (1, 2))
    assert once.params_active == dense.params_total + router
    assert twice.params_active == dense.params_total + router + 2 * 32 * 128
    assert dense.params_active == dense.params_total


def test_fine_grained_experts_are_the_coarse_mixture_cut_up() -> None:
    # 16 dense layers in all and the parameters and FLOPs of one a token, but for the wider router.
    dense, coarse, fine = (cost(load([f"ffn={name}"])) for name in ("dense", "moe_token_choice", "fine_grained_moe"))
    router = 32 * 63
    assert fine.params_total - router == coarse.params_total - 32 * 16
    assert fine.params_active - router == dense.params_active
    assert fine.flops_per_token - 3 * 2 * router == dense.flops_per_token


@pytest.mark.parametrize("d_model", [8, 20, 64, 256])
@pytest.mark.parametrize("other", ["moe", "moe_token_choice", "fine_grained_moe", "pkm", "peer"])
def test_wide_dense_has_the_parameters_of_the_other_layer_all_of_them_active(other: str, d_model: int) -> None:
    config = load([f"ffn={other}", f"d_model={d_model}"])
    wide = replace(config, ffn=WideDenseConfig(params_of=config.ffn))
    priced = cost(wide)
    assert abs(priced.params_total - cost(config).params_total) <= config.d_model
    assert priced.params_active == priced.params_total


def test_wide_dense_is_by_default_as_large_as_peer() -> None:
    wide = load(["ffn=wide_dense"]).ffn
    assert isinstance(wide, WideDenseConfig) and wide.params_of == load(["ffn=peer"]).ffn


def test_no_more_experts_are_active_than_there_are() -> None:
    few = cost(load(["ffn=peer", "ffn.n_experts=16", "ffn.n_heads=8", "ffn.top_k=4"]))
    assert few.params_active == few.params_total


def test_only_the_kernel_and_the_recipe_leave_the_cost_alone() -> None:
    base = load(["ffn=peer"])
    for same in (["trainer.kernel=reference"], ["optim.lr=1"], ["budget=1e9"], ["seed=7"], ["++ffn.activation=relu"]):
        assert cost(load(["ffn=peer", *same])) == cost(base)
    for other in (["context=128"], ["data.vocab_size=4096"], ["ffn.top_k=8"], ["d_model=40"], ["replaced=all"]):
        assert cost(load(["ffn=peer", *other])).flops_per_token != cost(base).flops_per_token
