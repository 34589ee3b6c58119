"""A layer outside peerscale: one module and one YAML file in a folder of the user's, and nothing edited here."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from peerscale.config.schema import Config, load, parse_config, to_dict
from peerscale.errors import ConfigError, UserError
from peerscale.files import ROOT
from peerscale.layers import registry
from peerscale.layers.registry import parse_layer
from peerscale.model.build import build_model
from peerscale.model.trained import load_model
from peerscale.plan.cells import planned_cells
from peerscale.plan.cost import cost
from peerscale.plan.plan import plan
from peerscale.records.fingerprint import differing_keys, hashed_config
from peerscale.records.record import planned_record
from peerscale.records.table import runs_table
from programs import call

RECIPE = (ROOT / "README.md").read_text().split("## A layer of your own")[1].split("\n## ")[0]
BLOCKS = dict(re.findall(r"^```(python|yaml)\n(.*?)^```", RECIPE, flags=re.S | re.M))
MODULE, YAML = BLOCKS["python"], BLOCKS["yaml"]


@pytest.fixture
def mylab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The README's two files in the current folder, and none of its imports left afterwards."""
    folder = tmp_path / "mylab"
    (folder / "conf" / "ffn").mkdir(parents=True)
    (folder / "gated.py").write_text(MODULE)
    (folder / "conf" / "ffn" / "gated.yaml").write_text(YAML)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    forget()
    yield folder
    forget()


def forget() -> None:
    """As a new process would start."""
    sys.modules.pop("gated", None)
    registry._source_sha256.cache_clear()
    registry._adapter.cache_clear()


def small(*overrides: str) -> Config:
    return load(["ffn=gated", "d_model=8", "data.vocab_size=257", "context=6", "batch_sequences=4", *overrides])


def test_a_file_without_its_first_line_is_told_so(mylab: Path) -> None:
    (mylab / "conf" / "ffn" / "gated.yaml").write_text(YAML.removeprefix("# @package _global_\n"))
    with pytest.raises(ConfigError, match=r"full_key: optim.lr .*a layer's file .* begins with .*_global_"):
        small()


def test_is_built_priced_and_initialised_as_the_readme_says(mylab: Path) -> None:
    config = load(["ffn=gated", "d_model=32", "ffn.d_hidden_over_d_model=2.5", "replaced=[2,3]"])
    model = build_model(config)
    layer = model.blocks[1].ffn
    assert type(layer).__name__ == "Gated" and config.ffn.name == "gated"
    for linear, std in ((layer.gate, 32**-0.5), (layer.up, 32**-0.5), (layer.down, 80**-0.5 / 8**0.5)):
        assert linear.weight.std().item() == pytest.approx(std, rel=0.1), "1 / fan-in, the last over sqrt(2 x 4 layers)"
    assert cost(config).params_total == sum(p.numel() for p in model.parameters())
    tokens = torch.zeros(2, config.context, dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens)
    assert 3 * counter.get_total_flops() == cost(config).flops_per_token * tokens.numel()


def test_is_hashed_with_its_code_but_not_with_what_explains_it(mylab: Path) -> None:
    config = small()
    before = hashed_config(config, plan(config), "corpus")
    assert parse_config(json.loads(json.dumps(to_dict(config)))) == config
    assert parse_layer({**before["ffn"], "class": "gated.GatedConfig"}) == config.ffn
    explained = MODULE.replace("(nn.Module):\n", '(nn.Module):\n    """A gate."""\n\n') + "\n# Tuned by hand.\n"
    for module, counts in ((explained, False), (MODULE.replace("F.silu", "F.gelu"), True)):
        assert module != MODULE
        (mylab / "gated.py").write_text(module)
        forget()
        changes = differing_keys(before, hashed_config(small(), plan(small()), "corpus"))
        assert changes == ["ffn.source_sha256 (the code of the layer's module changed)"] * counts
        assert registry.code_changed(before["ffn"]) is counts
    assert "source_sha256" not in hashed_config(load(["ffn=peer"]), plan(load(["ffn=peer"])), "corpus")["ffn"]


def test_a_study_varies_its_keys_and_tabulates_it(mylab: Path) -> None:
    study = mylab / "mine.yaml"
    study.write_text(
        "sweep:\n  methods: [dense, gated]\n  grid: [{budget: 9.0e11, d_model: [16, 20]}]\n"
        "  method_axes: {gated: {ffn.d_hidden_over_d_model: [2, 3]}}\n"
    )
    cells = planned_cells(study)
    assert [cell.name for cell in cells if cell.config.d_model == 16] == [
        "dense-d16-9e11-s0",
        "gated-d16-9e11-d_hidden_over_d_model=2.0-s0",
        "gated-d16-9e11-d_hidden_over_d_model=3.0-s0",
    ]
    table = runs_table(planned_record(cell) for cell in cells)
    assert list(table["method"].unique()) == ["dense", "gated"] and table["n_experts"].isna().all()


def test_stands_in_a_folder_of_pythonpath_and_trains(
    mylab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {n} of {n * 7919 % 1000} words" for n in range(6000)))
    overrides = [
        "ffn=gated", "d_model=8", "n_layers=2", "context=8", "budget=2e7", "min_steps=1", "data=text",
        f"data.path={text}", "data.vocab_size=300", f"data.directory={tmp_path / 'data'}", "tracking=disabled",
        "data.evaluation.validation=512", "data.max_epochs=100", f"trainer.runs_directory={tmp_path / 'runs'}",
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(mylab))
    monkeypatch.syspath_prepend(mylab)  # as Python does when it starts
    done = call(f"train {' '.join(overrides)}")
    assert done.code == 0, done.err
    (record,) = (json.loads(path.read_text()) for path in (tmp_path / "runs").glob("single/gated-*/record.json"))
    assert record["status"] == "done" and len(record["hashed_config"]["ffn"]["source_sha256"]) == 64
    (folder,) = (tmp_path / "runs").glob("single/gated-*")
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace(record["hashed_config"]["ffn"]["source_sha256"], 64 * "0"))
    with pytest.raises(UserError, match=r"gated.GatedConfig is in a file that was changed since the cell was trained"):
        load_model(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("class: nosuch.GatedConfig", "not found in the current folder or on PYTHONPATH: ModuleNotFoundError: No mod"),
        ("class: gated.GatedConfg", "AttributeError: module 'gated' has no attribute 'GatedConfg'"),
        ("class: gated.Gated", "class gated.Gated is not a subclass of peerscale.layers.FfnConfig"),
        ("class: peerscale.layers.peer.PeerConfig", "needs a default for method, and none of dense, "),
        ("class: gated.GatedConfig, method: peer", "method 'peer' is not that of GatedConfig, which is 'gated'"),
        ("method: gated", "method 'gated' is not a layer of peerscale, which are dense, "),
        (
            "class: gated.GatedConfig, d_hidden_over: 3",
            "ffn.d_hidden_over: Unexpected keyword argument",
        ),
        ("class: gated.GatedConfig, d_hidden_over_d_model: x", "ffn.d_hidden_over_d_model: Input should be a valid"),
    ],
)
def test_a_mistake_in_its_file_takes_one_line(mylab: Path, change: str, message: str) -> None:
    (mylab / "conf" / "ffn" / "gated.yaml").write_text(f"# @package _global_\nffn: {{{change}}}\n")
    with pytest.raises(ConfigError) as refused:
        small("optim.lr=1")
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("def cost(", "def costs(", "gated.GatedConfig needs the methods cost(self, around) and build(self, aro"),
        ("def build(", "def make(", "gated.GatedConfig needs the methods cost(self, around) and build(self, aro"),
        ("@layer_config", "# ", "not a subclass of peerscale.layers.FfnConfig with the decorator layer_config"),
        ('"gated"', '"peer"', "needs a default for method, and none of dense, "),
        (
            "return round(",
            "return rnd round(",
            "gated.GatedConfig is not found in the current folder or on PYTHONPATH: Synt",
        ),
        ("import torch.nn", "import nosuch\nimport torch.nn", "ModuleNotFoundError: No module named 'nosuch'"),
        ("3 * around", "2 * around", "Gated has 504 parameters at d_model 8, but cost of GatedConfig says 336: {'ffn"),
        ("def init_weights", "def init", "Gated has parameters but no method init_weights(self, output_scale)"),
    ],
)
def test_a_mistake_in_its_module_takes_one_line(mylab: Path, old: str, new: str, message: str) -> None:
    (mylab / "gated.py").write_text(MODULE.replace(old, new, 1))
    with pytest.raises(UserError) as refused:
        build_model(small())
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_an_override_of_a_key_that_it_lacks_is_refused(mylab: Path) -> None:
    with pytest.raises(ConfigError, match=r"^Could not override 'ffn.top_k'"):
        small("ffn.top_k=3")
