"""Cells on two devices: Lightning starts the processes, and they end with what one device ends with."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from small_cells import EXPLODES, assert_tracked, budget, final_weights

from peerscale.config.schema import composed, load
from peerscale.data.prepare import prepare
from peerscale.errors import UserError
from peerscale.plan.cells import single_cell
from peerscale.plan.plan import plan
from peerscale.records.curves import read_metrics
from peerscale.records.record import Record, Status, read_record
from peerscale.train import cell
from peerscale.train.checkpoint import StepCheckpoint
from peerscale.train.metrics import MetricsLog
from peerscale.train.module import LanguageModel

CASES = {
    "dense": ["ffn=dense", "trainer.micro_batches=2", "tracking=offline"],
    "expert choice": ["ffn=moe", "ffn.n_experts=4", "routing_group_sequences=4"],
    "token choice": ["ffn=moe_token_choice", "ffn.load_balance_weight=1", "routing_group_sequences=8"],
    "peer": ["ffn=peer", "ffn.query_norm=false"],
    "pkm": ["ffn=pkm", "ffn.query_norm=false"],
    "norm of groups": ["ffn=pkm", "ffn.query_norm=true", "ffn.query_bias=false", "routing_group_sequences=8"],
}


@pytest.fixture
def overrides(settings: list[str]) -> list[str]:
    return [*settings, "tracking=disabled", "trainer.checkpoint_every_steps=3", "trainer.keep_checkpoint=true"]


@pytest.fixture
def forked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes have what this one has imported, which takes each of them seconds, except in one case.

    A GPU forbids that.
    """
    if "dense" not in request.node.name and not torch.cuda.is_available():
        monkeypatch.setattr(cell, "DDPStrategy", lambda start_method: DDPStrategy(start_method="fork"))


def trained(overrides: list[str], n_devices: int, runs: Path, *more: str) -> tuple[Path, Record]:
    here = [f"trainer.devices={n_devices}", f"trainer.runs_directory={runs}"]
    planned = single_cell(composed([*overrides, *here, *more]))
    cell.train_cell(planned)
    record = read_record(planned.folder)
    assert record is not None
    return planned.folder, record


@pytest.mark.parametrize("case", CASES)
def test_two_devices_train_what_one_does(case: str, overrides: list[str], tmp_path: Path, forked: None) -> None:
    overrides = [*overrides, *CASES[case]]
    overrides.append(budget(overrides, 5))
    (one, of_one), (two, of_two) = (trained(overrides, n, tmp_path / str(n)) for n in (1, 2))
    assert of_one.status is of_two.status is Status.DONE and of_two.environment["n_devices"] == 2, of_two.traceback
    assert of_two.sequence_losses == pytest.approx(of_one.sequence_losses, abs=2e-5)
    rows, rows_of_two = (list(read_metrics(folder)) for folder in (one, two))
    assert [row["step"] for row in rows] == [2, 4, 5]
    for row, other in zip(rows, rows_of_two, strict=True):
        same = {key: value for key, value in row.items() if key != "tokens_per_s"}
        assert {key: other[key] for key in same} == pytest.approx(same, rel=2e-5, abs=2e-6)
    if case == "dense":
        assert_tracked(two)
    weights, weights_of_two = final_weights(one), final_weights(two)
    assert weights.keys() == weights_of_two.keys()
    for name, weight in weights.items():
        assert (weights_of_two[name] - weight).double().norm() <= 2e-5 * weight.double().norm(), name


def test_a_run_on_two_devices_goes_on_exactly(overrides: list[str], tmp_path: Path, forked: None) -> None:
    overrides = [*overrides, "ffn=peer", "ffn.query_norm=false", "trainer.devices=2"]
    config, ends = load([*overrides, budget(overrides, 7)]), []
    prepare(config.data)
    for folder, resumed in ((tmp_path / "unbroken", None), (tmp_path / "again", "unbroken/step-000000003.ckpt")):
        folder.mkdir()
        planned = plan(config)
        module = LanguageModel(config, planned)
        callbacks = [MetricsLog(config, planned, folder), StepCheckpoint(folder, config.trainer, fingerprint="")]
        cell.fit(module, callbacks, None, tmp_path / resumed if resumed else None)
        ends.append((module.state_dict(), [(row["step"], row["loss"]) for row in read_metrics(folder)]))
    (weights, rows), (weights_again, rows_again) = ends
    assert rows_again == rows[1:] and [step for step, _ in rows_again] == [4, 6, 7]
    assert all(torch.equal(weights_again[name], weight) for name, weight in weights.items())


def test_what_diverges_on_two_devices_is_recorded(overrides: list[str], tmp_path: Path, forked: None) -> None:
    overrides = [*overrides, "ffn=dense"]
    _, record = trained([*overrides, budget(overrides, 7)], 2, tmp_path, *EXPLODES)
    assert record.status is Status.DIVERGED and record.reason.startswith("the training loss is ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optim=row_sparse_adamw", "ffn.query_norm=false"], r"^optim=row_sparse_adamw trains on one device"),
        (["ffn.query_norm=true"], r"^BatchNorm takes statistics over the batch.*; ffn.query_norm=false, or groups"),
    ],
)
def test_what_only_one_device_can_do_is_refused(words: list[str], message: str, overrides: list[str]) -> None:
    planned = single_cell(composed([*overrides, "ffn=peer", *words, "trainer.devices=2", "budget=2e8"]))
    with pytest.raises(UserError, match=message):
        cell.train_cell(planned)
    assert not planned.folder.exists()
