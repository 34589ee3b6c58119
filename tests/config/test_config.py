import json
import re
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from peerscale.config.schema import (
    Config,
    OptimConfig,
    RateLawConfig,
    TableLawConfig,
    TrackingConfig,
    TrainerConfig,
    composed,
    load,
    parse_config,
    to_dict,
)
from peerscale.errors import ConfigError
from peerscale.files import ROOT
from peerscale.layers.fine_grained_moe import FineGrainedMoeConfig
from peerscale.layers.moe import MoeConfig
from peerscale.layers.peer import PeerConfig
from peerscale.layers.pkm import PkmConfig

GROUPS = ("data", "ffn", "optim", "tracking", "trainer")
FILES = [(group, name) for group in GROUPS for name in sorted(p.stem for p in (ROOT / "conf" / group).glob("*.yaml"))]
FFNS = [name for group, name in FILES if group == "ffn"]


def refusal(*overrides: str) -> str:
    """The message of a configuration that is refused."""
    with pytest.raises(ConfigError) as refused:
        load(overrides)
    return str(refused.value)


NOT_POSITIVE = "Input should be greater than 0, not"

MESSAGES = [
    ("~budget", "budget: Field required"),
    ("d_model=33", "d_model: Input should be a multiple of 2, not 33"),
    ("head_dim=12", "head_dim 12 does not divide d_model 32"),
    ("d_model=wide", "d_model: Input should be a valid integer, unable to parse string as an integer, not 'wide'"),
    ("ffn=peer ffn.n_experts=1000", "ffn: n_experts 1000 is not a square (product keys); nearest: 961, 1024"),
    ("ffn=peer ffn.top_k=65", "ffn: top_k 65 is more than the 64 sub-keys of a side; allowed: 1..64"),
    ("ffn=peer ++ffn.d_key=7", "ffn: d_key 7 is odd, but a key has two equal halves"),
    ("ffn=peer ++ffn.score=linear", "ffn.score: Input should be 'softmax' or 'sigmoid', not 'linear'"),
    ("ffn=moe_token_choice ffn.top_k=17", "ffn: top_k 17 is more than n_experts 16"),
    ("ffn=wide_dense ffn.params_of.top_k=0", f"ffn.params_of.top_k: {NOT_POSITIVE} 0"),
    ("seed=true", "seed: input should be a number, not true"),
    ("replaced=[2,5]", "replaced [2, 5] names a block outside 1..4"),
    ("context=true", "context: input should be a number, not true"),
    ("optim.beta1=false", "optim.beta1: input should be a number, not false"),
    ("data.evaluation.validation=true", "data.evaluation.validation: input should be a number, not true"),
    ("+foo=3", "foo: Unexpected keyword argument"),
    ("+trainer.treads=1", "trainer.treads: Unexpected keyword argument; did you mean threads?"),
    ("ffn=peer +ffn.routing=token_choice", "ffn.routing: Unexpected keyword argument"),
    ("ffn=pkm ffn.topk=3", "Could not override 'ffn.topk'; did you mean top_k?"),
    ("batchsequences=3", "Could not override 'batchsequences'; did you mean batch_sequences?"),
    ("lr=3", "Could not override 'lr'; did you mean optim.lr?"),
    ("size=32", "Could not override 'size'; did you mean d_model?"),
    ("2e11}]", "override 2e11}]: not a key=value; one with blanks needs quotes of its own, as in "
     "OVERRIDES=\"'key=[1, 2]'\""),
    ("budget=${nosuch}", "Interpolation key 'nosuch' not found full_key: budget object_type=dict"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "message"), MESSAGES, ids=[overrides for overrides, _ in MESSAGES])
def test_what_cannot_be_run_is_refused_in_one_line(overrides: str, message: str) -> None:
    assert refusal(*overrides.split()) == message


def test_an_unknown_file_is_refused_with_the_ones_there_are() -> None:
    known = " ".join(name for group, name in FILES if group == "ffn")
    assert refusal("ffn=peerr") == f"In 'config': Could not find 'ffn/peerr' Available options in 'ffn': {known}"


@pytest.mark.parametrize(("group", "name"), FILES, ids=lambda part: part)
def test_every_file_of_conf_loads(group: str, name: str, tmp_path: Path) -> None:
    config = load([f"{group}={name}", *([f"data.path={tmp_path}"] if name == "text" else [])])
    match group:
        case "ffn":
            assert config.ffn.name == name
        case "data":
            assert config.data.source == name
        case "tracking":
            assert config.tracking.mode == name


@pytest.mark.parametrize("ffn", FFNS)
def test_every_layers_file_names_its_rates(ffn: str) -> None:
    # Last in the defaults, so that the rates tuned for the layer stand, whatever the optimiser's file says.
    config = load([f"ffn={ffn}"])
    file = yaml_file(f"ffn/{ffn}")
    while "optim" not in file:  # a variant of another layer
        file = yaml_file(f"ffn/{file['defaults'][0]}")
    assert config.optim.lr == file["optim"]["lr"]
    assert (config.optim.table_lr is not None) == (config.ffn.method in ("peer", "pkm", "memory_plus", "engram"))


def yaml_file(name: str) -> dict[str, Any]:
    from omegaconf import OmegaConf

    tree = OmegaConf.to_container(OmegaConf.load(ROOT / f"conf/{name}.yaml"))
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def test_the_defaults_in_code_are_those_of_conf() -> None:
    usual = load(["ffn=dense"])
    assert usual.trainer == TrainerConfig()
    assert usual.tracking == TrackingConfig()
    law = {key: getattr(usual.optim, key) for key in ("lr", "lr_rule", "lr_law")}  # fitted, so in conf/ alone
    assert usual.optim == OptimConfig(**law)
    given = {"d_model", "ffn", "data", "optim", "trainer", "tracking", "budget"}
    assert Config(**{name: getattr(usual, name) for name in given}) == usual


def test_conf_is_what_the_paper_says_at_this_scale() -> None:
    peer, pkm = load(["ffn=peer"]).ffn, load(["ffn=pkm"]).ffn
    assert isinstance(peer, PeerConfig) and isinstance(pkm, PkmConfig)
    assert (pkm.n_experts, pkm.n_heads, pkm.top_k) == (peer.n_experts, peer.n_heads, 2 * peer.top_k)
    assert peer.query_norm and pkm.query_norm
    assert (peer.score, peer.shared_keys) == ("softmax", True)
    moe = load(["ffn=moe"]).ffn
    assert isinstance(moe, MoeConfig) and moe.routing == "expert_choice"
    assert load([]).replaced == "middle"


def test_conf_holds_the_settings_that_are_better_by_the_rule_of_settings() -> None:
    runs = pd.read_csv(ROOT / "results/settings/runs.csv").fillna({"variant": "", "settings": "{}"})
    chosen = {}
    for (method, variant), rows in runs.groupby(["method", "variant"]):
        means = rows.groupby("settings")["val_loss"].agg(["mean", "size"])
        better = means[(means["size"] == 3) & (means["mean"] < means.loc["{}", "mean"] - 0.02)]
        if len(better):
            chosen["_".join(filter(None, (method, variant)))] = json.loads(better["mean"].idxmin())
    assert chosen.keys() == {"moe"}
    for name, settings in chosen.items():
        ffn = yaml_file(f"ffn/{name}")["ffn"]
        assert {key: ffn[key.removeprefix("ffn.")] for key in settings} == settings


def test_the_further_baselines_differ_from_their_models_in_what_they_are_for() -> None:
    pkm, equal, peer = (load([f"ffn={name}"]).ffn for name in ("pkm", "pkm_equal_top_k", "peer"))
    assert isinstance(equal, PkmConfig) and isinstance(pkm, PkmConfig) and isinstance(peer, PeerConfig)
    assert equal == replace(pkm, variant="equal_top_k", top_k=peer.top_k)
    fine = load(["ffn=fine_grained_moe"]).ffn
    assert fine == FineGrainedMoeConfig()
    # As many active hidden units as dense, as many in total as the coarse mixture's 16 dense layers.
    assert fine.top_k + fine.n_shared == fine.granularity
    assert fine.n_experts + fine.n_shared == 16 * fine.granularity


def all_keys(node: Any, prefix: str = "") -> list[str]:
    keys = []
    for field in fields(node):
        value = getattr(node, field.name)
        parts = is_dataclass(value) and not isinstance(value, RateLawConfig | TableLawConfig)
        keys += all_keys(value, f"{prefix}{field.name}.") if parts else [f"{prefix}{field.name}"]
    return keys


@pytest.mark.parametrize("ffn", FFNS)
def test_every_key_but_the_layers_can_be_overridden_plainly(ffn: str) -> None:
    tree = composed([f"ffn={ffn}"]).tree
    missing = [
        key
        for key in all_keys(load([f"ffn={ffn}"]))
        if not key.startswith("ffn.") and (key.split(".")[-1] not in (tree[key.split(".")[0]] if "." in key else tree))
    ]
    assert set(missing) <= {"data.path"}  # which is in the file of the corpus that has one


@pytest.mark.parametrize("ffn", FFNS)
def test_round_trips_through_plain_values_json_and_yaml(ffn: str) -> None:
    config = load([f"ffn={ffn}", "replaced=[1,3]", "budget=1.5e12", "optim.eps=1e-9", "tracking.tags=[a,b]"])
    plain = to_dict(config)
    assert parse_config(plain) == config
    assert parse_config(json.loads(json.dumps(plain))) == config
    assert parse_config(yaml.safe_load(yaml.safe_dump(plain))) == config
    assert to_dict(parse_config(plain)) == plain


def test_overrides_win_over_files_and_the_last_over_the_first() -> None:
    config = load(["ffn=peer", "optim.lr=0.5", "seed=1", "seed=2", "budget=3e11"])
    assert (config.optim.lr, config.seed, config.budget) == (0.5, 2, 3e11)


@pytest.mark.parametrize(
    ("d_model", "d_key"), [(8, 8), (12, 8), (16, 8), (20, 12), (24, 12), (28, 16), (32, 16), (64, 32), (256, 128)]
)
def test_keys_are_half_as_wide_as_the_model(d_model: int, d_key: int) -> None:
    ffn = PeerConfig(n_experts=16, n_heads=1, top_k=1)
    assert ffn.resolved_d_key(d_model) == d_key
    assert abs(d_key - max(8, d_model / 2)) <= 2 and d_key % 4 == 0
    assert PeerConfig(n_experts=16, n_heads=1, top_k=1, d_key=6).resolved_d_key(d_model) == 6


@pytest.mark.parametrize(
    ("replaced", "n_layers", "blocks"),
    [("middle", 12, (6,)), ("middle", 5, (2,)), ("middle", 1, (1,)), ("all", 3, (1, 2, 3)), ("[4,1,4]", 4, (1, 4))],
)
def test_replaced_blocks_count_from_one(replaced: str, n_layers: int, blocks: tuple[int, ...]) -> None:
    assert load([f"replaced={replaced}", f"n_layers={n_layers}"]).replaced_blocks == blocks


@pytest.mark.parametrize(
    ("keys", "name", "n_heads"),
    [
        ("d_model=32", "d32", 2),
        ("d_model=32 n_layers=6", "d32-l6", 2),
        ("d_model=32 head_dim=4", "d32-h8", 8),
        ("d_model=32 head_dim=16", "d32", 2),
        ("d_model=64 head_dim=32 n_layers=12", "d64-l12-h2", 2),
        ("d_model=48", "d48", 4),
        ("d_model=48 head_dim=16", "d48-h3", 3),
        ("d_model=2", "d2", 1),
        ("d_model=72", "d72", 6),
        ("d_model=34", "d34", 17),
        ("d_model=1024 head_dim=64 n_layers=16", "d1024-l16-h16", 16),
    ],
)
def test_a_sizes_name_says_what_is_unusual(keys: str, name: str, n_heads: int) -> None:
    config = load(keys.split())
    assert (config.size_name, config.n_heads) == (name, n_heads)


def test_sizes_of_one_width_have_names_of_their_own() -> None:
    usual, names = load(), {}
    for d_model in range(2, 130, 2):
        for head_dim in (width for width in range(2, d_model + 1, 2) if d_model % width == 0):
            for n_layers in (3, 4):
                config = replace(usual, d_model=d_model, head_dim=head_dim, n_layers=n_layers)
                assert names.setdefault(config.size_name, config) is config


def test_conf_holds_the_law_that_results_rates_prints() -> None:
    text = (ROOT / "results/rates/table.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    printed = yaml.safe_load(block)
    assert printed["methods"].keys() == {"dense", "moe", "moe_token_choice", "pkm", "peer"}
    for ffn, settings in printed["methods"].items():
        optim, of_method = load([f"ffn={ffn}"]).optim, settings["optim"]
        assert (optim.lr, optim.lr_rule) == (of_method["lr"], printed["optim"]["lr_rule"])
        assert optim.lr_law == RateLawConfig(**printed["optim"]["lr_law"] | of_method.get("lr_law", {}))
