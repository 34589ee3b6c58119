"""The layer of docs/layers.md, which has tokens, a place, shared weights, state, and a training of its own."""

import re
import sys
from pathlib import Path

import pytest
import torch

from peerscale.api import build_model, cost, load
from peerscale.config.schema import Config
from peerscale.errors import UserError
from peerscale.files import ROOT
from peerscale.layers import registry
from peerscale.plan.memory import device_memory
from peerscale.plan.plan import plan, schedule
from peerscale.train.optimizer import build_optimizer, build_scheduler, parameter_groups
from programs import call

(MODULE,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "layers.md").read_text(), flags=re.S | re.M)
YAML = "# @package _global_\nffn: {class: recall.RecallConfig, n_rows: 100}\noptim: {lr: 8e-3, table_lr: 0.1}\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "conf" / "ffn").mkdir(parents=True)
    (tmp_path / "recall.py").write_text(MODULE)
    (tmp_path / "conf" / "ffn" / "recall.yaml").write_text(YAML)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "recall", raising=False)
    registry._source_sha256.cache_clear()
    return tmp_path


def small(*overrides: str) -> Config:
    return load(["ffn=recall", "d_model=16", "n_layers=3", "data.vocab_size=257", "replaced=[1,3]", *overrides])


def test_cost_and_memory_count_the_dense_layers_and_the_shared_table_once(here: Path) -> None:
    dense, priced = cost(load(["ffn=dense", "d_model=16", "n_layers=3", "data.vocab_size=257"])), cost(small())
    assert priced.params_total == sum(p.numel() for p in build_model(small()).parameters())
    assert priced.params_total == dense.params_total + 2 * 16**2 + 100 * 16
    assert priced.params_active == dense.params_total + 2 * (16**2 + 16), "a row in each of two blocks"
    assert priced.flops_per_token == dense.flops_per_token + 3 * 2 * 2 * 16**2
    one, two = (device_memory(small(f"replaced={blocks}"))["activations"] for blocks in ("[1]", "[1,3]"))
    assert two - one == one - device_memory(small("ffn=dense"))["activations"]


@pytest.mark.parametrize("place", ["feed_forward", "beside", "before_attention"])
def test_each_place_is_what_its_name_says(place: str, here: Path) -> None:
    (here / "recall.py").write_text(MODULE.replace('return "beside"', f'return "{place}"'))
    torch.manual_seed(0)
    model, tokens = build_model(small()).double(), torch.randint(257, (2, 8))
    block, x = model.blocks[0], torch.randn(2, 8, 16, dtype=torch.float64)
    layer = {"feed_forward": block.ffn, "beside": block.beside, "before_attention": block.before}[place]
    layer.strength.fill_(1)

    def recall(x: torch.Tensor) -> torch.Tensor:
        return (x @ layer.gate.weight.T).sigmoid() * layer.table[tokens % 100]

    y = x + recall(x) if place == "before_attention" else x
    y = y + block.attention(block.attention_norm(y))
    normed = block.ffn_norm(y)
    if place != "feed_forward":
        y = y + torch.nn.functional.gelu(normed @ block.ffn.up.weight.T) @ block.ffn.down.weight.T
    if place != "before_attention":
        y = y + recall(normed)
    torch.testing.assert_close(block(x, tokens), y)
    assert (model.blocks[2].ffn if place == "feed_forward" else model.blocks[1].ffn) is not layer
    assert cost(small()).params_total == sum(p.numel() for p in model.parameters())


def test_rates_and_decays_are_those_that_it_states_at_every_step(here: Path) -> None:
    config, model = small("budget=3e9"), build_model(small())
    planned = plan(config)
    optimizer = build_optimizer(parameter_groups(model), config, planned)
    scheduler, steps = build_scheduler(optimizer, config, planned), planned.steps
    assert steps > 20
    stated = {"gate": (2 * planned.lr, 1.0, 0.0), "table": (0.1, 0.1, 0.0)}
    usual = {True: (planned.lr, 1.0, config.optim.weight_decay), False: (planned.lr, 1.0, 0.0)}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for step in range(steps):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                part = re.sub(r".*beside\.(gate|table).*", r"\1", names[parameter])
                peak, final, decay = stated.get(part, usual[parameter.ndim > 1])
                rate = peak * schedule(config, planned, step) * (1 + (final - 1) * step / (steps - 1))
                assert group["lr"] == pytest.approx(rate, rel=1e-12) and group["weight_decay"] == decay
        optimizer.step()
        scheduler.step()
    (tables,) = (group["params"] for group in optimizer.param_groups if group.get("tables"))
    assert [names[parameter].rpartition(".")[2] for parameter in tables] == ["table"], "whose rate is table_lr"
    everything = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(everything) == len({*everything}) == len(names)


def test_a_wrong_count_of_what_is_shared_is_refused(here: Path) -> None:
    (here / "recall.py").write_text(MODULE.replace("layer.table = around.first.table", "pass"))
    with pytest.raises(UserError, match=r"^Recall has 1,856 parameters at d_model 16, but cost of RecallConfig .* 256"):
        build_model(small())


def test_trains_by_the_ordinary_command_and_its_state_moves(here: Path) -> None:
    text = here / "text.txt"
    text.write_text("\n".join(f"line {n} of {n * 7919 % 1000} words" for n in range(6000)))
    done = call(
        f"train ffn=recall d_model=8 n_layers=2 replaced=all context=8 budget=2e7 min_steps=1 data=text "
        f"data.path={text} data.vocab_size=300 data.directory={here / 'data'} tracking=disabled "
        f"data.evaluation.validation=512 data.max_epochs=100 trainer.keep_checkpoint=true "
        f"trainer.runs_directory={here / 'runs'}"
    )
    assert done.code == 0, done.err
    (checkpoint,) = (here / "runs" / "single").glob("recall-*/checkpoints/*.ckpt")
    state = torch.load(checkpoint, weights_only=True)
    weights, beside = state["state_dict"], "model.blocks.{}.beside.{}".format
    assert weights[beside(0, "strength")].item() == pytest.approx(min(1, state["global_step"] / 100))
    assert torch.equal(weights[beside(0, "table")], weights[beside(1, "table")])
