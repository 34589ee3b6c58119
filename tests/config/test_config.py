import json
import re
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from peerscale.config.schema import (
    Config,
    ConfigError,
    OptimConfig,
    RateLawConfig,
    SizeConfig,
    TrackingConfig,
    TrainerConfig,
    compose,
    load,
    parse_config,
    to_dict,
)
from peerscale.files import ROOT
from peerscale.layers.dense import DenseConfig, NoLayerConfig, WideDenseConfig
from peerscale.layers.moe import FineGrainedMoeConfig, MoeConfig
from peerscale.layers.product_keys import PeerConfig, PkmConfig

GROUPS = ("data", "ffn", "optim", "size", "tracking", "trainer")
FILES = [(group, name) for group in GROUPS for name in sorted(p.stem for p in (ROOT / "conf" / group).glob("*.yaml"))]
FFNS = [name for group, name in FILES if group == "ffn"]


def refusal(*overrides: str) -> str:
    """The message of a configuration that is refused."""
    with pytest.raises(ConfigError) as refused:
        load(overrides)
    return str(refused.value)


NOT_POSITIVE = "input should be greater than 0, not"

MESSAGES = [
    ("~budget", "budget: missing"),
    ("~size", "size: missing"),
    (
        "size.d_model=33",
        "size: 2 heads do not divide d_model 33 into an even width (rotary embedding needs pairs); nearest d_model: 32",
    ),
    (
        "size.d_model=30 size.n_heads=5 size.d_model=33",
        "size: 5 heads do not divide d_model 33 into an even width (rotary embedding needs pairs); nearest d_model: 30",
    ),
    ("size.d_model=0", f"size.d_model: {NOT_POSITIVE} 0"),
    ("trainer.device_utilisation=0", f"trainer.device_utilisation: {NOT_POSITIVE} 0"),
    ("size.n_layers=-1", f"size.n_layers: {NOT_POSITIVE} -1"),
    (
        "size.d_model=wide",
        "size.d_model: input should be a valid integer, unable to parse string as an integer, not 'wide'",
    ),
    ("size.d_model=3.5", "size.d_model: input should be a valid integer, got a number with a fractional part, not 3.5"),
    ("ffn=peer ffn.n_experts=1000", "ffn: n_experts 1000 is not a square (product keys); nearest: 961, 1024"),
    ("ffn=pkm ffn.n_experts=2", "ffn: n_experts 2 is not a square (product keys); nearest: 1, 4"),
    ("ffn=peer ffn.top_k=65", "ffn: top_k 65 is more than the 64 sub-keys of a side; allowed: 1..64"),
    ("ffn=peer ++ffn.d_key=7", "ffn: d_key 7 is odd, but a key has two equal halves"),
    ("ffn=peer ffn.n_heads=0", f"ffn.n_heads: {NOT_POSITIVE} 0"),
    ("ffn=peer ++ffn.activation=swish", "ffn.activation: input should be 'gelu' or 'relu', not 'swish'"),
    ("ffn=peer ++ffn.score=linear", "ffn.score: input should be 'softmax' or 'sigmoid', not 'linear'"),
    ("ffn=moe ffn.routing=hash", "ffn.routing: input should be 'expert_choice' or 'token_choice', not 'hash'"),
    ("ffn=moe ffn.capacity_factor=0", f"ffn.capacity_factor: {NOT_POSITIVE} 0"),
    ("ffn=moe_token_choice ffn.top_k=17", "ffn: top_k 17 is more than n_experts 16"),
    (
        "ffn=moe_token_choice ++ffn.z_loss_weight=-1",
        "ffn.z_loss_weight: input should be greater than or equal to 0, not -1",
    ),
    ("ffn=fine_grained_moe ffn.top_k=64", "ffn: top_k 64 is more than n_experts 63"),
    ("ffn=fine_grained_moe ffn.n_shared=0", f"ffn.n_shared: {NOT_POSITIVE} 0"),
    (
        "ffn=wide_dense ffn.params_of.n_experts=5",
        "ffn.params_of: n_experts 5 is not a square (product keys); nearest: 4, 9",
    ),
    ("ffn=wide_dense ffn.params_of.top_k=0", f"ffn.params_of.top_k: {NOT_POSITIVE} 0"),
    ("ffn=wide_dense ~ffn.params_of", "ffn.params_of: missing"),
    ("data.source=web", "data.source: input should be 'gutenberg' or 'text', not 'web'"),
    ("data.vocab_size=256", "data.vocab_size: input should be greater than or equal to 257, not 256"),
    ("data.vocab_size=65537", "data.vocab_size: input should be less than or equal to 65536, not 65537"),
    ("data.evaluation.tuning=-1", "data.evaluation.tuning: input should be greater than or equal to 0, not -1"),
    (
        "data.val_set=exam",
        "data: val_set 'exam' has no tokens in evaluation, which names "
        "['validation', 'tuning', 'speeches', 'wikipedia']",
    ),
    (
        "data.val_set=tuning",
        "data: val_set 'tuning' has no tokens in evaluation, which names "
        "['validation', 'tuning', 'speeches', 'wikipedia']",
    ),
    ("data=text", "data: source text needs data.path=FILE_OR_FOLDER (.txt, .jsonl, .parquet)"),
    ("optim.lr=0", f"optim.lr: {NOT_POSITIVE} 0"),
    ("optim.lr=null", "optim.lr: input should be a valid number, not None"),
    ("optim.lr=nan", "optim.lr: input should be a finite number, not nan"),
    ("optim.warmup_fraction=1.5", "optim.warmup_fraction: input should be less than or equal to 1, not 1.5"),
    ("optim.schedule=linear", "optim.schedule: input should be 'cosine' or 'wsd', not 'linear'"),
    ("optim.lr_rule=mup", "optim.lr_rule: input should be 'constant', 'inverse_sqrt_width' or 'law', not 'mup'"),
    ("trainer.accelerator=tpu", "trainer.accelerator: input should be 'auto', 'cpu' or 'gpu', not 'tpu'"),
    ("tracking.mode=on", "tracking.mode: input should be 'offline', 'online' or 'disabled', not 'on'"),
    ("tracking.tags=a", "tracking.tags: input should be a valid list, not 'a'"),
    ("budget=-1e12", f"budget: {NOT_POSITIVE} -1000000000000.0"),
    ("budget=inf", "budget: input should be a finite number, not inf"),
    ("budget=much", "budget: input should be a valid number, unable to parse string as a number, not 'much'"),
    ("seed=-1", "seed: input should be greater than or equal to 0, not -1"),
    ("replaced=[2,5]", "replaced [2, 5] names a block outside 1..4"),
    ("batch_sequences=0", f"batch_sequences: {NOT_POSITIVE} 0"),
    ("context=1", "context: input should be greater than or equal to 2, not 1"),
    ("precision=fp16", "precision: input should be 'fp32' or 'bf16', not 'fp16'"),
    ("min_steps=0", f"min_steps: {NOT_POSITIVE} 0"),
]


@pytest.mark.parametrize(("overrides", "message"), MESSAGES, ids=[overrides for overrides, _ in MESSAGES])
def test_what_cannot_be_run_is_refused_in_one_line(overrides: str, message: str) -> None:
    assert refusal(*overrides.split()) == message


@pytest.mark.parametrize(
    "overrides",
    [
        *("foo=3", "size.foo=3", "ffn.foo=x", "optim.lrr=3", "data.tokens=3", "+trainer.gpus=1", "+tracking.name=me"),
        *("ffn=wide_dense +ffn.params_of.score_=3", "ffn=wide_dense ffn.d_ff=99"),
        *("+foo=3", "ffn=peer +ffn.routing=token_choice", "ffn=dense ffn.n_experts=4"),
    ],
)
def test_an_unknown_key_is_refused_by_name(overrides: str) -> None:
    key = overrides.split()[-1].lstrip("+").partition("=")[0]
    message = refusal(*overrides.split())
    assert message.startswith(f"unknown key {key}; ") and "\n" not in message


@pytest.mark.parametrize(
    ("override", "nearest"),
    [("optim.lrr=3", "optim.lr"), ("batchsequences=3", "batch_sequences"), ("size.dmodel=8", "size.d_model")],
)
def test_a_misspelt_key_is_answered_with_the_nearest(override: str, nearest: str) -> None:
    key, _, _ = override.partition("=")
    assert re.match(rf"unknown key {re.escape(key)}; did you mean {re.escape(nearest)}[ ?]", refusal(override))


@pytest.mark.parametrize(
    "override", ["ffn=peerr", "size=d33", "data=web", "optim=sgd", "tracking=foo", "trainer=abacus"]
)
def test_an_unknown_file_is_refused_with_the_ones_there_are(override: str) -> None:
    known = ", ".join(name for group, name in FILES if group == override.partition("=")[0])
    assert refusal(override) == f"unknown choice {override}; there are: {known}"


@pytest.mark.parametrize("override", ["data.evaluation=[1", "budget", "size=[a", "~nosuch"])
def test_what_hydra_refuses_takes_one_line_too(override: str) -> None:
    message = refusal(override)
    assert message and "\n" not in message


@pytest.mark.parametrize("override", ["size=null", "ffn=null", "=3"])
def test_a_group_that_is_no_name_is_refused(override: str) -> None:
    try:
        load([override])
    except ConfigError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("override", ["replaced=last", "replaced=[0]", "replaced=[1,a]"])
def test_the_refusal_of_replaced_says_what_is_allowed(override: str) -> None:
    message = refusal(override)
    assert message.startswith("replaced") and "literal[" not in message
    assert "middle" in message and "all" in message and "list" in message


@pytest.mark.parametrize(
    "override",
    [
        "seed=true",
        "size.n_layers=true",
        "optim.beta2=1",
        "replaced=[]",
    ],
)
def test_what_training_cannot_use_is_refused(override: str) -> None:
    refusal(override)


@pytest.mark.parametrize(("group", "name"), FILES, ids=lambda part: part)
def test_every_file_of_conf_loads(group: str, name: str, tmp_path: Path) -> None:
    config = load([f"{group}={name}", *([f"data.path={tmp_path}"] if name == "text" else [])])
    match group:
        case "size":
            assert config.size.name == name
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
    base = yaml_file(f"ffn/{file['defaults'][0]}") if "defaults" in file else {}  # as a variant of this layer
    assert config.optim.lr == (base | file)["optim"]["lr"]
    assert (config.optim.table_lr is not None) == isinstance(config.ffn, PeerConfig | PkmConfig)


def yaml_file(name: str) -> dict[str, Any]:
    from omegaconf import OmegaConf

    tree = OmegaConf.to_container(OmegaConf.load(ROOT / f"conf/{name}.yaml"))
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def test_the_defaults_in_code_are_those_of_conf() -> None:
    composed = load(["ffn=dense"])
    assert composed.trainer == TrainerConfig()
    assert composed.tracking == TrackingConfig()
    law = {key: getattr(composed.optim, key) for key in ("lr", "lr_rule", "lr_law")}  # fitted, so in conf/ alone
    assert composed.optim == OptimConfig(**law)
    given = {"size", "ffn", "data", "optim", "trainer", "tracking", "budget"}
    bare = Config(**{name: getattr(composed, name) for name in given})
    assert bare == composed


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
    runs = pd.read_csv(ROOT / "results/settings/runs.csv").fillna({"variant": "", "axes": "{}"})
    chosen = {}
    for (method, variant), rows in runs.groupby(["method", "variant"]):
        means = rows.groupby("axes")["val_loss"].agg(["mean", "size"])
        better = means[(means["size"] == 3) & (means["mean"] < means.loc["{}", "mean"] - 0.02)]
        if len(better):
            chosen["_".join(filter(None, (method, variant)))] = json.loads(better["mean"].idxmin())
    assert chosen.keys() == {path.stem for path in (ROOT / "conf/before_settings").glob("*.yaml")}
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
        parts = is_dataclass(value) and not isinstance(value, RateLawConfig)
        keys += all_keys(value, f"{prefix}{field.name}.") if parts else [f"{prefix}{field.name}"]
    return keys


@pytest.mark.parametrize("ffn", FFNS)
def test_every_key_but_the_layers_can_be_overridden_plainly(ffn: str) -> None:
    tree = compose([f"ffn={ffn}"]).tree
    missing = [
        key
        for key in all_keys(load([f"ffn={ffn}"]))
        if not key.startswith("ffn.") and (key.split(".")[-1] not in (tree[key.split(".")[0]] if "." in key else tree))
    ]
    assert set(missing) <= {"data.path"}  # which is in the file of the corpus that has one


@pytest.mark.parametrize(
    ("ffn", "override", "value"),
    [
        ("peer", "query_norm=false", False),
        ("peer", "d_key=16", 16),
        ("peer", "activation=relu", "relu"),
        ("peer", "score=sigmoid", "sigmoid"),
        ("peer", "shared_keys=false", False),
        ("pkm", "query_norm=false", False),
        ("moe_token_choice", "load_balance_weight=0.1", 0.1),
        ("moe_token_choice", "z_loss_weight=0.1", 0.1),
        ("fine_grained_moe", "granularity=8", 8),
        ("fine_grained_moe", "n_shared=2", 2),
    ],
)
def test_every_key_of_a_layer_can_be_overridden_plainly(ffn: str, override: str, value: Any) -> None:
    config = load([f"ffn={ffn}", f"ffn.{override}"])
    assert getattr(config.ffn, override.partition("=")[0]) == value


@pytest.mark.parametrize("ffn", FFNS)
def test_round_trips_through_plain_values_json_and_yaml(ffn: str) -> None:
    config = load([f"ffn={ffn}", "replaced=[1,3]", "budget=1.5e12", "optim.eps=1e-9", "tracking.tags=[a,b]"])
    plain = to_dict(config)
    assert parse_config(plain) == config
    assert parse_config(json.loads(json.dumps(plain))) == config
    assert parse_config(yaml.safe_load(yaml.safe_dump(plain))) == config
    assert to_dict(parse_config(plain)) == plain


def test_is_frozen_and_takes_keywords_alone() -> None:
    config = load([])
    with pytest.raises(FrozenInstanceError):
        config.seed = 3  # type: ignore[misc]
    with pytest.raises((TypeError, ValueError)):
        SizeConfig(32)  # type: ignore[misc]


def test_a_layer_is_chosen_by_its_tag() -> None:
    assert {name: type(load([f"ffn={name}"]).ffn) for name in FFNS} == {
        "dense": DenseConfig,
        "wide_dense": WideDenseConfig,
        "no_layer": NoLayerConfig,
        "fine_grained_moe": FineGrainedMoeConfig,
        "pkm_equal_top_k": PkmConfig,
        "moe": MoeConfig,
        "moe_token_choice": MoeConfig,
        "pkm": PkmConfig,
        "peer": PeerConfig,
    }


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
    assert load([f"replaced={replaced}", f"size.n_layers={n_layers}"]).replaced_blocks == blocks


@pytest.mark.parametrize(
    ("size", "name"),
    [
        ({"d_model": 32}, "d32"),
        ({"d_model": 32, "n_layers": 6}, "d32-l6"),
        ({"d_model": 32, "n_heads": 8}, "d32-h8"),
        ({"d_model": 64, "n_heads": 2, "n_layers": 12}, "d64-l12-h2"),
        ({"d_model": 48, "n_heads": 4}, "d48"),
        ({"d_model": 48, "n_heads": 3}, "d48-h3"),
        ({"d_model": 2, "n_heads": 1}, "d2"),
        ({"d_model": 72, "n_heads": 6}, "d72"),
        ({"d_model": 72, "n_heads": 9}, "d72-h9"),
    ],
)
def test_a_sizes_name_says_what_is_unusual(size: dict[str, int], name: str) -> None:
    assert SizeConfig(**size).name == name


def test_sizes_of_one_width_have_names_of_their_own() -> None:
    names: dict[str, SizeConfig] = {}
    for d_model in range(2, 130, 2):
        for n_heads in (n for n in range(1, d_model) if d_model % (2 * n) == 0):
            for n_layers in (3, 4):
                size = SizeConfig(d_model=d_model, n_heads=n_heads, n_layers=n_layers)
                assert names.setdefault(size.name, size) == size


def test_conf_holds_the_law_that_results_rates_prints() -> None:
    text = (ROOT / "results/rates/table.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    printed = yaml.safe_load(block)
    assert printed["methods"].keys() == {"dense", "moe", "moe_token_choice", "pkm", "peer"}
    for ffn, of_method in printed["methods"].items():
        optim = load([f"ffn={ffn}"]).optim
        assert (optim.lr, optim.lr_rule) == (of_method["lr"], printed["optim"]["lr_rule"])
        assert optim.lr_law == RateLawConfig(**printed["optim"]["lr_law"] | of_method.get("lr_law", {}))
