"""Runs of several lengths that share their first part: each ends as if it had been trained alone."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from peerscale.data.store import open_corpus
from peerscale.errors import UserError
from peerscale.launch.overview import main as overview
from peerscale.launch.run import main as launch
from peerscale.model.trained import CHECKPOINTS, checkpoints
from peerscale.plan.branches import in_turn
from peerscale.plan.cells import Cell, planned_cells
from peerscale.plan.plan import decay_from
from peerscale.records.curves import read_metrics
from peerscale.records.record import LOCK, Status, read_record, write_record
from peerscale.train.cell import CellRun
from peerscale.train.environment import describe
from peerscale.train.run import run_cell
from test_train import budget, corpus_path, final_weights, settings  # noqa: F401
from toy_study import record_of

WSD = ["optim.schedule=wsd", "optim.warmup_steps=4", "optim.decay_fraction=0.25", "optim.lr_rule=constant"]


def branched(settings: list[str], folder: Path, *more: str) -> list[Cell]:  # noqa: F811
    """Dense and PEER at three budgets: about 12, 24 and 40 steps."""
    words = [word for word in settings if word != "size=d8"]
    budgets = [budget([*settings, "ffn=dense"], n).removeprefix("budget=") for n in (24, 12, 40)]
    rows = ", ".join(f"{{budget: {each}, sizes: [d8]}}" for each in budgets)
    file = folder / "branches.yaml"
    file.write_text(f"sweep: {{methods: [dense, peer], grid: [{rows}], branches: true, min_sizes: 1}}\n")
    return planned_cells(file, [*words, "tracking=disabled", "trainer.keep_checkpoint=true", *more])


def test_a_branch_ends_as_the_same_run_alone(settings: list[str], tmp_path: Path) -> None:  # noqa: F811
    cells = branched(settings, tmp_path, *WSD)
    groups = in_turn(cells)
    assert [len(group) for group in groups] == [3, 3]
    for trunk, *branches in groups:
        assert trunk.plan.steps == max(cell.plan.steps for cell in (trunk, *branches))
        assert {name for _, name in trunk.branches} == {cell.name for cell in branches}
        assert run_cell(trunk) is Status.DONE
        for cell in branches:
            start = decay_from(cell.config, cell.plan)
            assert [path.name for path in checkpoints(cell.folder / CHECKPOINTS)] == [f"step-{start:09d}.ckpt"]
            assert run_cell(cell) is Status.DONE
            assert min(row["step"] for row in read_metrics(cell.folder)) > start
            away = replace(cell.config.trainer, runs_directory=str(tmp_path / "alone"))
            alone = replace(cell, trunk="", config=replace(cell.config, trainer=away))
            assert run_cell(alone) is Status.DONE
            here, there = read_record(cell.folder), read_record(alone.folder)
            assert here is not None and there is not None and here.fingerprint == there.fingerprint
            assert here.sequence_losses == there.sequence_losses and here.bit_exact
            weights, others = final_weights(cell.folder), final_weights(alone.folder)
            assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_a_trunk_leaves_nothing_to_a_cell_that_was_begun(settings: list[str], tmp_path: Path) -> None:  # noqa: F811
    trunk, *branches = in_turn(branched(settings, tmp_path, *WSD))[0]
    done = branches[0]
    run_cell(done)
    before = {path: path.stat().st_mtime_ns for path in done.folder.rglob("*")}
    run_cell(trunk)
    assert {path: path.stat().st_mtime_ns for path in done.folder.rglob("*")} == before
    assert checkpoints(branches[1].folder / CHECKPOINTS)


def test_a_trunk_leaves_nothing_to_a_cell_that_another_process_is_starting(
    settings: list[str], tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    """It has no record yet, but its lock is held."""
    trunk, starting, *_ = in_turn(branched(settings, tmp_path, *WSD))[0]
    starting.folder.mkdir(parents=True)
    with FileLock(starting.folder / LOCK):
        run_cell(trunk)
    assert [path.name for path in starting.folder.iterdir()] == [LOCK]


def test_a_branch_goes_on_only_from_a_trunk_of_its_own_configuration(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    def edited(cell: Cell, runs: str = "runs") -> Cell:
        optim = replace(cell.config.optim, weight_decay=0.5)
        trainer = replace(cell.config.trainer, runs_directory=str(tmp_path / runs))
        return replace(cell, config=replace(cell.config, optim=optim, trainer=trainer))

    trunk, *branches = in_turn(branched(settings, tmp_path, *WSD))[0]
    run_cell(trunk)
    for cell, retrained in zip(branches, (False, True), strict=True):
        if retrained:
            shutil.rmtree(trunk.folder)
            run_cell(edited(trunk))
        run_cell(edited(cell))
        run_cell(alone := replace(edited(cell, "alone"), trunk=""))
        weights, others = final_weights(cell.folder), final_weights(alone.folder)
        assert all(torch.equal(weights[name], others[name]) for name in weights)
        assert (min(row["step"] for row in read_metrics(cell.folder)) > decay_from(cell.config, cell.plan)) == retrained
        assert ("is of another configuration, starting at the first step" in capsys.readouterr().err) != retrained


def test_a_branch_begins_with_the_environment_of_its_trunk_and_is_no_more_exact(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    ((trunk, branch, other),) = in_turn(branched(settings, tmp_path, *WSD, "sweep.methods=[dense]"))
    corpus = open_corpus(trunk.config.data)
    here = describe("torch", torch.device("cpu"), trunk.config.trainer)
    for exact, then in ((True, here), (True, {**here, "torch": "0.1"}), (False, here)):
        write_record(trunk.folder, record_of(trunk, Status.DONE, environment=then, bit_exact=exact))
        run = CellRun(branch, corpus, None)
        assert run.record.environment == then and run.record.bit_exact == exact
        run._continue_in(here, 9)  # from the checkpoint that the trunk left
        assert run.record.environment == here and run.record.bit_exact == (exact and then == here)
        said = f"notice: {branch.name} continues with another torch: not bit-exact\n"
        assert capsys.readouterr().err == said * (then != here)
    begun = record_of(other, Status.RUNNING, environment=here, bit_exact=True)
    assert CellRun(other, corpus, begun).record.bit_exact, "its own record comes first"


def test_a_sweep_trains_a_trunk_before_its_branches_and_the_plan_tells_what_that_saves(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    cells = branched(settings, tmp_path, *WSD, "sweep.methods=[dense]")
    words = [*(word for word in settings if word != "size=d8"), "tracking=disabled", *WSD, "sweep.methods=[dense]"]
    assert overview(["plan", str(tmp_path / "branches.yaml"), *words]) == 0
    steps = {cell.name: cell.plan.steps for cell in cells}
    (trunk,) = (cell for cell in cells if cell.branches)
    saved = sum(step for step, _ in trunk.branches) / sum(steps.values())
    assert "2 cells are branches: " in (told := capsys.readouterr().out) and f"{saved:.0%} are saved" in told
    assert launch([str(tmp_path / "branches.yaml"), *words]) == 0
    first = {cell.name: min(row["step"] for row in read_metrics(cell.folder)) for cell in cells}
    assert {name for name, step in first.items() if step > 4} == {cell.name for cell in cells if cell.trunk}


def test_the_branches_of_a_trunk_that_another_process_runs_are_left_to_it(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    cells = branched(settings, tmp_path, *WSD)
    (trunk,) = (cell for cell in cells if cell.branches and cell.config.ffn.name == "dense")
    words = [*(word for word in settings if word != "size=d8"), "tracking=disabled", *WSD, "sweep.methods=[dense]"]
    trunk.folder.mkdir(parents=True)
    with FileLock(trunk.folder / LOCK):
        assert launch([str(tmp_path / "branches.yaml"), *words]) == 0
    assert "some cells are being run by another process" in capsys.readouterr().err
    assert not any(read_record(cell.folder) for cell in cells)


def test_runs_with_other_batches_share_no_steps(settings: list[str], tmp_path: Path) -> None:  # noqa: F811
    branched(settings, tmp_path, *WSD)
    file = tmp_path / "branches.yaml"
    file.write_text(file.read_text().replace("}], branches", ", batch_sequences: 32}], branches"))
    words = [word for word in settings if word not in ("size=d8", "batch_sequences=16")]
    cells = planned_cells(file, [*words, "tracking=disabled", *WSD])
    batch = {cell.name: cell.config.batch_sequences for cell in cells}
    assert sorted(batch.values()) == [16, 16, 16, 16, 32, 32]
    for cell in cells:
        with_it = {cell.trunk, *(name for _, name in cell.branches)} - {""}
        assert len(with_it) == (batch[cell.name] == 16) and {batch[name] for name in with_it} <= {batch[cell.name]}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("optim.schedule=cosine", "sweep.branches needs optim.schedule wsd"),
        ("optim.warmup_steps=null", "sweep.branches needs optim.warmup_steps, the same for all budgets"),
    ],
)
def test_what_would_part_them_early_is_refused(
    changed: str, message: str, settings: list[str], tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    wsd = [word for word in WSD if word.partition("=")[0] != changed.partition("=")[0]]
    with pytest.raises(UserError, match=re.escape(f"branches.yaml: {message}")):
        branched(settings, tmp_path, *wsd, changed)


def test_one_rate_for_all_lengths_is_asked_for(settings: list[str], tmp_path: Path) -> None:  # noqa: F811
    law = (
        "optim.lr_law={reference_d_model: 8, reference_tokens: 1e4, reference_batch_sequences: 16, width_exponent: 0, "
        "tokens_exponent: 0.5, batch_exponent: 0.5, fitted_d_model: [8, 8], fitted_tokens: [1e3, 1e5], "
        "fitted_batch_sequences: [16, 16]}"
    )
    with pytest.raises(UserError, match="needs one learning rate for all budgets of a model, but dense-d8-l2-"):
        branched(settings, tmp_path, *WSD[:3], "optim.lr_rule=law", law)
