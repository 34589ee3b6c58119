"""GPU memory, times and costs of a plan; what training keeps is compared with what autograd saves."""

from dataclasses import replace

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from peerscale.config.schema import Config, load
from peerscale.files import ROOT
from peerscale.launch.plan_table import plan_row, time_lines
from peerscale.launch.speed import Estimate, Measured, estimate, share_of_peak
from peerscale.layers.dense import Dense
from peerscale.layers.swiglu import gated_width
from peerscale.model.build import build_model
from peerscale.ops.cross_entropy import linear_cross_entropy
from peerscale.plan.cells import planned_cells
from peerscale.plan.cost import cost
from peerscale.plan.memory import device_memory, in_memory
from peerscale.plan.plan import plan
from peerscale.train.module import LanguageModel
from peerscale.train.optimizer import build_optimizer

DENSE = ["dense", "relu_squared", "swiglu"]
FFNS = sorted(path.stem for path in (ROOT / "conf" / "ffn").glob("*.yaml"))
NARROWER = {"wide_dense": ["ffn.params_of.n_experts=1024"]}
"""Settings of a layer that would take long here."""
GPU = ["trainer.accelerator=gpu"]


def saved_bytes(config: Config) -> int:
    """What autograd keeps of a forward pass, parameters apart; of the head only its gradient is kept."""
    model, kept = build_model(config).train(), {}
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), x)
        return x

    tokens = torch.randint(config.data.vocab_size, (config.batch_sequences, config.context + 1))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        features = model.features(tokens[:, :-1]).flatten(0, 1)
        linear_cross_entropy(features, model.embedding.weight, tokens[:, 1:].flatten(), model.operators)
        model.auxiliary_loss()
    return sum(n for n, _ in kept.values()) - 4 * model.embedding.weight.numel()


@pytest.mark.parametrize("ffn", FFNS)
def test_activations_are_about_what_autograd_saves(ffn: str) -> None:
    """In bf16 see `test_the_most_memory_of_a_step`."""
    settings = [f"ffn={ffn}", "trainer.kernel=torch", *NARROWER.get(ffn, [])]
    for width, replaced in ((64, "middle"), (128, "all")):
        config = load([*settings, f"d_model={width}", f"head_dim={width // 4}", f"replaced={replaced}"])
        assert device_memory(config)["activations"] == pytest.approx(saved_bytes(config), rel=0.15), (width, replaced)


@pytest.mark.parametrize("ffn", [*DENSE, "wide_dense", "moe", "peer"])
def test_checkpointing_keeps_the_inputs_of_what_is_computed_again(ffn: str) -> None:
    shape = ["d_model=64", "n_layers=8"]
    settings = [f"ffn={ffn}", "trainer.kernel=torch", *shape, *NARROWER.get(ffn, [])]
    config = load([*settings, "trainer.activation_checkpointing=true"])
    hidden = max(layer.up.out_features for layer in build_model(config).modules() if isinstance(layer, Dense))
    of_layer = max(2 * hidden, 4 * gated_width(256) * (ffn == "swiglu"))
    one_block = 4 * config.tokens_per_step * (9 * 64 + 2 * 64 + of_layer)
    activations = device_memory(config)["activations"]
    assert activations == pytest.approx(saved_bytes(config) + one_block, rel=0.15)
    assert activations < 0.6 * device_memory(load(settings))["activations"]
    planned, usual = plan(config), plan(load(settings))
    assert (planned.steps, planned.flops) == (usual.steps, usual.flops), "the budget is as it was"
    again = planned.cost.flops_per_token - planned.cost.flops["logits"]
    again -= planned.cost.layer_flops * (ffn not in (*DENSE, "wide_dense"))
    speeds = [Measured(ffn, planned.cost.flops_per_token, 1e10)]
    slower = estimate(config, planned, speeds).s - estimate(load(settings), usual, speeds).s
    assert slower == pytest.approx(planned.tokens * again / 3 / 1e10)


def test_memory_of_one_device() -> None:
    config = load(["ffn=dense", "d_model=64", "precision=bf16", "trainer.micro_batches=2", "trainer.devices=4"])
    memory = device_memory(config)
    assert memory["state"] == (16 + 2) * cost(config).params_total
    assert memory["activations"] == 2 * 64 * 4 * (2 * 19 + 2 * 4) * 64  # 2 sequences of 64 tokens, 4 blocks, norms fp32
    compiled = replace(config, trainer=replace(config.trainer, accelerator="gpu"))
    assert device_memory(compiled)["activations"] == 2 * 64 * 4 * 2 * 19 * 64


def test_a_table_that_blocks_share_is_there_once() -> None:
    words = ["ffn=memory_plus", "ffn.n_experts=65536", "d_model=64", "optim=row_sparse_adamw"]
    for blocks in ("middle", "all"):
        config = load([*words, f"replaced={blocks}"])
        table, rest = 65536 * 64, sum(p.numel() for p in build_model(config).parameters()) - 65536 * 64
        assert device_memory(config)["state"] == 12 * table + 16 * rest, (
            "weights, moments, and gradients but the table's"
        )


LARGE_TABLES = ["context=16", "batch_sequences=32", "ffn.n_heads=16", "ffn.top_k=32"]  # all rows are read in a step


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("ffn", "shape", "optim"),
    [
        *[("peer", [], "adamw"), ("peer", LARGE_TABLES, "adamw"), ("pkm", LARGE_TABLES, "adamw")],
        *[("peer", LARGE_TABLES, "row_sparse_adamw"), ("pkm", LARGE_TABLES, "row_sparse_adamw")],
    ],
)
def test_the_most_memory_of_a_step(
    ffn: str, shape: list[str], optim: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what torch's own tracker of allocations sees, with an eager model on the CPU."""
    monkeypatch.setattr("peerscale.plan.memory.LOGITS_BYTES", 0)
    words = [f"ffn={ffn}", f"optim={optim}", f"precision={precision}", "d_model=128", "head_dim=32", *shape]
    config = load([*words, "ffn.n_experts=16384", "trainer.kernel=torch", "budget=1e12"])
    module = LanguageModel(config, plan(config))
    optimizer = build_optimizer(module.groups, config, module.plan)
    tokens = torch.randint(config.data.vocab_size, (config.batch_sequences, config.context + 1))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, precision == "bf16"):
            loss = module.training_step(tokens, 0)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # which makes the moments
    tracker = MemTracker()
    tracker.track_external(module, optimizer)
    with tracker:
        step()
    most = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert sum(device_memory(config).values()) == pytest.approx(most, rel=0.15)


def test_activations_are_checkpointed_only_where_a_cell_does_not_fit_otherwise() -> None:
    large = [*GPU, "d_model=256", "batch_sequences=64", "context=512", "ffn=peer", "precision=bf16"]
    for room, checkpointing in ((4, False), (2, True), (0.1, True)):
        config = load([*large, f"trainer.device_memory_gb={room}"])
        assert in_memory(config).trainer.activation_checkpointing is checkpointing
        assert bool(plan(config).reason.endswith("0.1")) == (room == 0.1)
    assert not in_memory(load([*large, "trainer.accelerator=cpu"])).trainer.activation_checkpointing


def test_shares_of_peak_and_kept_checkpoints_in_the_plan() -> None:
    words = [*GPU, "trainer.devices=8", "batch_sequences=128", "trainer.keep_checkpoint=true"]
    shares = {ffn: share_of_peak(load([f"ffn={ffn}", *words])) for ffn in ("dense", "moe", "peer", "pkm")}
    assert shares == {"dense": 0.3, "moe": 0.23, "peer": 0.145, "pkm": 0.145}
    assert share_of_peak(load(["ffn=peer", *GPU])) == 0.21
    assert share_of_peak(load(["ffn=peer", *words, "trainer.device_utilisation=0.5"])) == 0.5
    cells = planned_cells("isoflop_paper")
    assert {cell.plan.verdict for cell in cells} == {"OK"} and len(cells) == 56
    line = time_lines(cells, {cell.name: Estimate(3600.0, False) for cell in cells}, None)[-1]
    params = sum(cell.plan.cost.params_total for cell in cells)
    assert line == f"kept checkpoints (trainer.keep_checkpoint): {12 * params / 1e9:,.3g} GB on disk"


def test_a_cell_that_does_not_fit_is_dropped() -> None:
    large = [*GPU, "d_model=256", "budget=5e14", "batch_sequences=64", "context=512", "trainer.device_memory_gb=2"]
    large += ["trainer.activation_checkpointing=false"]
    dense = plan(load([*large, "ffn=dense", "trainer.micro_batches=1"]))
    assert dense.reason.startswith("3.68 GB, 0.")
    assert dense.reason.endswith(" of them weights and moments, are more than trainer.device_memory_gb 2")
    assert plan(load([*large, "ffn=dense"])).reason == "", "the plan chooses micro-batches"
    assert plan(load([*large, "ffn=peer"])).reason, "all of a batch are one routing group"
    assert plan(load([*large, "ffn=peer", "routing_group_sequences=8"])).reason == ""
    assert plan(load(["trainer.accelerator=cpu", *large[1:], "ffn=dense"])).reason == "", "on a CPU nothing is asked"


@pytest.mark.parametrize(
    ("ffn", "group", "parts"), [("dense", 64, 4), ("peer", 8, 4), ("peer", 16, 4), ("peer", 64, 1)]
)
def test_the_plan_chooses_the_fewest_parts_that_fit(ffn: str, group: int, parts: int) -> None:
    large = [*GPU, "d_model=256", "budget=5e14", "batch_sequences=64", "context=512", "trainer.device_memory_gb=2"]
    large += ["trainer.activation_checkpointing=false"]
    config = load([*large, f"ffn={ffn}", f"routing_group_sequences={group}"])
    chosen = in_memory(config)
    assert chosen.trainer.micro_batches == parts
    fits = {n: sum(device_memory(replace(config, trainer=replace(config.trainer, micro_batches=n))).values()) < 2e9
            for n in (1, 2, 4)}  # fmt: skip
    assert fits == {1: False, 2: False, 4: True}
    assert (plan(config).reason == "") == (parts == 4)
    cpu = load(["trainer.accelerator=cpu", *large[1:], f"ffn={ffn}"])
    assert in_memory(cpu).trainer.micro_batches == 1


def test_a_time_on_gpus_is_of_their_records_or_a_share_of_their_peak() -> None:
    config = load([*GPU, "ffn=dense", "budget=1e15", "trainer.devices=2", "trainer.device_flops_per_s=1e14"])
    planned = plan(config)
    work = planned.flops + planned.evaluation_tokens * planned.cost.flops_per_token / 3
    assert estimate(config, planned, []) == (pytest.approx(1 + work / (2 * 0.3 * 1e14)), True)
    of_cpu = Measured("dense", planned.cost.flops_per_token, 1e10, ("cpu", 2, 1))
    assert estimate(config, planned, [of_cpu]).is_guess, "a CPU's speed is none of a GPU's"
    of_gpus = Measured("dense", planned.cost.flops_per_token, 5e13, ("cuda", 2, 0))
    assert estimate(config, planned, [of_gpus, of_cpu]) == (pytest.approx(1 + work / 5e13), False)
    on_cpu = load(["ffn=dense", "trainer.devices=2"])
    assert estimate(on_cpu, plan(on_cpu), [of_gpus]).is_guess


def test_the_plan_tells_gpu_hours_their_cost_and_the_largest_cell() -> None:
    cells = planned_cells("smoke", [*GPU, "trainer.devices=2"])
    known, guessed = ({cell.name: Estimate(3600.0, guess) for cell in cells} for guess in (False, True))
    (line,) = time_lines(cells, known, 2.5)
    assert line.startswith("20 GPU-hours, 50 at 2.5 an hour; the largest cell takes about 1.0")
    assert plan_row(cells[0], known[cells[0].name])["time"] == "60 min on 2 GPUs"
    guess, line = time_lines(cells, guessed, None)
    assert guess.startswith("time? is estimated from a share of the GPU's peak")
    assert "GPU-hours; PRICE=2.5 gives their cost" in line
    assert time_lines(planned_cells("smoke"), known, 2.5) == time_lines([], {}, 2.5) == []
