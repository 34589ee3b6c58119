"""What became of planned cells: by the plan, by their records, or refused since these are of other cells."""

from dataclasses import replace
from pathlib import Path

import pytest

from peerscale.errors import UserError
from peerscale.plan.cell import Cell
from peerscale.plan.cells import planned_cells
from peerscale.plan.plan import Verdict
from peerscale.records.outcome import how_to_rerun, outcome, outcomes
from peerscale.records.record import Status, write_record
from toy_study import CORPUS, record_of, write_study


@pytest.fixture
def cell(tmp_path: Path) -> Cell:
    return planned_cells(
        write_study(tmp_path, "{methods: [dense], grid: [{budget: 1e10, d_model: 8}]}"), ["min_steps=1"]
    )[0]


def test_an_outcome_is_that_of_the_record_or_else_of_the_plan(cell: Cell) -> None:
    dropped = replace(cell, plan=replace(cell.plan, verdict=Verdict.DROP))
    assert outcome(cell, CORPUS).status is Status.PENDING
    assert outcome(dropped, CORPUS).status is Status.DROPPED
    for status in (Status.FAILED, Status.DIVERGED, Status.DONE):
        write_record(cell.folder, record_of(cell, status))
        assert outcome(cell, CORPUS).status is status
        assert outcome(dropped, CORPUS).status is (status if status is Status.DONE else Status.DROPPED)
    write_record(cell.folder, record_of(cell, Status.RUNNING))
    assert outcome(cell, CORPUS).status is Status.INTERRUPTED, "no process holds it"


def test_a_cell_of_another_configuration_is_refused_naming_what_differs(cell: Cell) -> None:
    write_record(cell.folder, record_of(cell, Status.DONE, config={"context": 32, "precision": "bf16"}))
    message = (
        f"{cell.folder} holds a run of another configuration: context 32 -> 64; precision 'bf16' -> 'fp32'. "
        f"To keep it and go on: mv '{cell.folder}' '{cell.folder}.old'"
    )
    with pytest.raises(UserError) as refused:
        outcome(cell, CORPUS)
    assert str(refused.value) == message == outcomes([cell])[0].refused


def test_a_cell_of_another_corpus_is_refused(cell: Cell) -> None:
    write_record(cell.folder, record_of(cell, Status.DONE, corpus="f" * 16))
    with pytest.raises(UserError, match=f"data_fingerprint '{'f' * 16}' -> '{CORPUS}'"):
        outcome(cell, CORPUS)
    assert outcome(cell, None).status is Status.DONE, "its corpus is not prepared here"


def test_a_cell_run_with_another_kernel_is_the_same_cell(cell: Cell) -> None:
    write_record(cell.folder, record_of(cell, Status.DONE, config={"min_steps": 2}))
    elsewhere = replace(cell.config, trainer=replace(cell.config.trainer, kernel="reference", threads=2))
    assert outcome(replace(cell, config=elsewhere), CORPUS).status is Status.DONE


def test_only_a_diverged_cell_must_be_set_aside_to_run_again(cell: Cell) -> None:
    assert how_to_rerun(cell, Status.FAILED) == "the same command tries it again"
    assert how_to_rerun(cell, Status.DIVERGED).endswith(f"mv '{cell.folder}' '{cell.folder}.old'")
