"""What a cell leaves behind: nothing when it is refused, one checkpoint when it is asked to keep its model."""

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from filelock import FileLock
from small_cells import budget
from test_checkpoint import Code
from torch import nn

import peerscale.model.build
from peerscale.config.schema import composed, load
from peerscale.data.batches import EvaluationBatches
from peerscale.data.prepare import prepare
from peerscale.data.store import open_corpus
from peerscale.errors import UserError
from peerscale.model.trained import checkpoints, load_model
from peerscale.plan.cells import Cell, single_cell
from peerscale.records.record import LOCK, Record, Status, read_record, write_record
from peerscale.train import cell as cells
from peerscale.train.cell import train_cell
from peerscale.train.run import run_single


@pytest.fixture
def tiny(settings: list[str]) -> list[str]:
    """A cell of 8 steps."""
    overrides = [*settings, "tracking=disabled"]
    prepare(load(overrides).data)
    return [*overrides, budget(overrides, 8)]


def cell(overrides: list[str]) -> Cell:
    return single_cell(composed(overrides))


def trained(overrides: list[str]) -> tuple[Path, Record]:
    """Folder and record of a cell that trains without a fault."""
    planned = cell(overrides)
    assert train_cell(planned) is Status.DONE
    record = read_record(planned.folder)
    assert record is not None
    return planned.folder, record


def test_a_layer_that_draws_no_weights_is_refused_before_anything_is_written(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peerscale.model.build, "layers_under_study", lambda *_: iter([nn.Linear(8, 8)]))
    with pytest.raises(UserError, match=r"^Linear has parameters but no method init_weights"):
        train_cell(cell(tiny))
    assert not cell(tiny).folder.exists()


@pytest.mark.parametrize(("module", "part"), [(cells, "describe"), (peerscale.model.build, "layers_under_study")])
def test_a_fault_before_training_is_recorded(
    module: ModuleType, part: str, tiny: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The environment, in which a GPU may fail, is described first, and then the model is built."""

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    planned = cell(tiny)
    with monkeypatch.context() as patch:
        patch.setattr(module, part, fail)
        assert train_cell(planned) is Status.FAILED
    record = read_record(planned.folder)
    assert record is not None and record.reason == "RuntimeError: out of memory"
    assert (planned.folder / "config.yaml").is_file()
    assert train_cell(planned) is Status.DONE
    assert "not bit-exact" not in capsys.readouterr().err


@pytest.mark.parametrize("compile", [False, True])
def test_a_cell_that_is_to_be_compiled_is_and_says_so(
    compile: bool, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    _, record = trained([*tiny, "trainer.compile=true"] if compile else tiny)
    assert record.environment["compiled"] is compile and len(compiled) == compile


@pytest.mark.parametrize("layer", ["dense", "peer"])
def test_a_kept_model_is_the_one_that_was_evaluated(layer: str, tiny: list[str]) -> None:
    ffn = [*tiny, f"ffn={layer}", "trainer.keep_checkpoint=true", "trainer.checkpoint_every_steps=3"]
    folder, record = trained([*ffn, budget(ffn, 8)])
    assert [path.name for path in checkpoints(folder / "checkpoints")] == ["step-000000008.ckpt"]
    model, config = load_model(folder), load([*ffn, budget(ffn, 8)])
    assert not model.training
    tokens = open_corpus(config.data).tokens("validation")
    losses = []
    for batch in EvaluationBatches(tokens, 512, batch_sequences=config.batch_sequences, context=config.context):
        batch = torch.from_numpy(batch)
        with torch.no_grad():
            predicted = model(batch[:, :-1]).log_softmax(-1)
        losses.append(-predicted.gather(-1, batch[:, 1:, None]).mean().item())
    assert sum(losses) / len(losses) == pytest.approx(record.evaluation["validation"]["loss"], abs=1e-5)


def test_a_cell_that_is_not_asked_keeps_no_checkpoint(tiny: list[str]) -> None:
    folder, _ = trained([*tiny, "trainer.checkpoint_every_steps=3"])
    assert checkpoints(folder / "checkpoints") == []
    with pytest.raises(UserError) as error:
        load_model(folder)
    assert str(error.value) == (
        f"{folder} kept no checkpoint; to train the cell again and keep it, move this folder away and add "
        "trainer.keep_checkpoint=true to the command"
    )


def test_a_cell_killed_in_its_evaluation_keeps_the_same_model(tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    overrides = [*tiny, "trainer.keep_checkpoint=true"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cells, "evaluate", killed)
        train_cell(cell(overrides))
    folder = cell(overrides).folder
    with pytest.raises(UserError) as error:
        load_model(folder)
    assert str(error.value) == f"{folder}: the cell is running; only one that is done can be loaded"
    (before,) = checkpoints(folder / "checkpoints")
    weights = torch.load(before, weights_only=True)["state_dict"]
    _, record = trained(overrides)
    assert record.timing["wall_s"] > 0
    assert [path.name for path in checkpoints(folder / "checkpoints")] == [before.name]
    loaded = load_model(str(folder)).state_dict()
    assert {f"model.{name}" for name in loaded} == set(weights)
    assert all(torch.equal(weights[f"model.{name}"], weight) for name, weight in loaded.items())


def test_what_cannot_be_loaded_is_one_line(tiny: list[str], tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError) as error:
            load_model(folder)
        assert str(error.value) == f"{folder} is not the folder of a cell: it has no record.json"
    folder, record = trained([*tiny, "trainer.keep_checkpoint=true"])
    config = (folder / "config.yaml").read_text()
    for name, content, said in (
        ("config.yaml", "", "[Ii]nput should be"),
        ("config.yaml", config.replace("beta2: 0.95", "beta2: 0.85"), r"optim\.beta2 0\.95 -> 0\.85"),
        ("config.yaml", "a: [1", rf"^{folder}/config.yaml cannot be read \(ParserError\)$"),
        ("record.json", '{"status": "do', rf"^{folder}/record.json: not JSON"),
    ):
        whole = (folder / name).read_text()
        (folder / name).write_text(content)
        with pytest.raises(UserError, match=said):
            load_model(folder)
        (folder / name).write_text(whole)
    (path,) = checkpoints(folder / "checkpoints")
    earlier = path.rename(path.with_name("step-000000001.ckpt"))  # as if it had been killed before it removed it
    with pytest.raises(UserError, match="kept no checkpoint"):
        load_model(folder)
    earlier.rename(path)
    state = torch.load(path, weights_only=True)
    torch.save({**state, "fingerprint": "another run's"}, path)
    with pytest.raises(UserError, match=f"{path} is of another configuration"):
        load_model(folder)
    torch.save({"state_dict": Code(tmp_path / "sign")}, path)
    with pytest.raises(UserError) as error:
        load_model(folder)
    assert str(error.value) == f"{path} cannot be read (UnpicklingError)"
    assert not (tmp_path / "sign").exists()
    path.write_bytes(b"torn")
    with pytest.raises(UserError) as error:
        load_model(folder)
    assert str(error.value).startswith(f"{path} cannot be read (")
    write_record(folder, replace(record, status=Status.DIVERGED))
    with pytest.raises(UserError, match="the cell is diverged; only one that is done can be loaded"):
        load_model(folder)


def test_the_last_line_of_a_single_cell_says_where_its_model_is(tiny: list[str], capsys: pytest.CaptureFixture) -> None:
    overrides = [*tiny, "trainer.keep_checkpoint=true"]
    planned = cell(overrides)
    path = planned.folder / "checkpoints" / "step-000000008.ckpt"
    for _ in range(2):  # trained, and found done
        run_single(composed(overrides))
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.endswith(f" nats per token; {planned.folder}; trained model: {path}")


def test_a_single_cell_that_another_process_runs_is_no_error(
    tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    planned = cell(tiny)
    planned.folder.mkdir(parents=True)
    with FileLock(planned.folder / LOCK):
        run_single(composed(tiny))
    printed = capsys.readouterr()
    assert printed.out == "" and f"{planned.name} is being run by another process and is skipped here" in printed.err
    assert read_record(planned.folder) is None
