"""Estimates of time: a guess at first, then by what was measured on this machine."""

from dataclasses import replace
from pathlib import Path

import pytest

from peerscale.launch.speed import (
    GUESS_FLOPS_PER_S,
    estimate,
    estimates,
    makespan_s,
    measured_speeds,
    published_speeds,
)
from peerscale.plan.cells import planned_cells
from peerscale.records.machine import cpu_name
from peerscale.records.record import Status, write_record
from peerscale.records.study import RESULTS
from toy_study import record_of, write_study


def test_time_is_a_guess_until_a_cell_of_the_method_is_done(tmp_path: Path) -> None:
    file = write_study(tmp_path, "{methods: [dense, peer], grid: [{budget: 1e10, d_model: [8]}]}")
    dense, peer = planned_cells(file)
    assert all(found.is_guess for found in estimates([dense, peer]).values())
    write_record(dense.folder, record_of(dense, Status.DONE, timing={"flops_per_s": 5e8}))
    write_record(dense.folder.parent / "torn", record_of(dense, Status.DONE))
    (dense.folder.parent / "torn/record.json").write_text("{")
    found = estimates([dense, peer])
    assert (found[dense.name].is_guess, found[peer.name].is_guess) == (False, True)
    evaluated = dense.plan.evaluation_tokens * dense.plan.cost.flops_per_token / 3
    assert found[dense.name].s == pytest.approx((dense.plan.flops + evaluated) / 5e8, abs=2)


def test_a_guess_goes_by_published_cells_of_the_method_or_of_any(tmp_path: Path) -> None:
    dense, peer, pkm = planned_cells(
        write_study(tmp_path, "{methods: [dense, peer, pkm], grid: [{budget: 1e10, d_model: [8]}]}")
    )
    results = tmp_path / "results"
    (results / "toy").mkdir(parents=True)
    (results / "toy" / "runs.csv").write_text(
        "method,variant,n_threads,flops_per_token,flops_per_s,status\n"
        f"dense,,1,{dense.plan.cost.flops_per_token * 2},2e9,done\n"
        f"dense,,1,{dense.plan.cost.flops_per_token * 9},9e9,done\n"
        f"peer,,1,{peer.plan.cost.flops_per_token * 50},5e9,done\n"
        f"pkm,,1,{pkm.plan.cost.flops_per_token},,failed\n"
    )
    for cell, rate in ((dense, 2e9), (peer, 5e9), (pkm, 2e9)):
        work = cell.plan.flops + cell.plan.evaluation_tokens * cell.plan.cost.flops_per_token / 3
        guess = estimate(cell.config, cell.plan, published_speeds(results))
        assert guess == (pytest.approx(1 + work / rate), True)
        assert estimate(cell.config, cell.plan, []) == (pytest.approx(1 + work / GUESS_FLOPS_PER_S), True)


def test_the_published_study_is_guessed_as_long_as_it_took() -> None:
    cells = planned_cells("reproduce")
    seconds = [estimate(cell.config, cell.plan, published_speeds(RESULTS)).s for cell in cells]
    assert 15 / 1.5 < makespan_s(seconds, 2) / 60 < 26 * 1.5, "15 minutes at usual speed, 26 on a slow day"


@pytest.mark.parametrize(
    ("seconds", "workers", "expected"), [([3, 1, 2], 1, 6), ([3, 1, 2], 2, 3), ([3, 1, 2], 9, 3), ([], 2, 0)]
)
def test_the_time_of_a_study_is_that_of_its_last_worker(seconds: list[float], workers: int, expected: float) -> None:
    assert makespan_s(seconds, workers) == expected


def test_time_goes_by_the_done_cell_of_the_nearest_cost_and_the_same_threads_and_machine(tmp_path: Path) -> None:
    cells = planned_cells(write_study(tmp_path, settings="min_steps: 65"))
    small, middle, _, large = [cell for cell in cells if cell.config.ffn.method == "dense"]
    runs = small.folder.parents[1]
    write_record(small.folder, record_of(small, Status.DONE, timing={"flops_per_s": 1e9}))
    write_record(large.folder, record_of(large, Status.DONE, timing={"flops_per_s": 4e9}))
    wrong = record_of(middle, Status.DONE, timing={"flops_per_s": 9e15})
    for name, record in {
        "failed": replace(wrong, status=Status.FAILED),
        "other_machine": replace(wrong, environment={"hardware": "abacus", "n_threads": 1}),
        "more_threads": replace(wrong, environment={"hardware": cpu_name(), "n_threads": 8}),
        "more_devices": replace(wrong, environment={"hardware": cpu_name(), "n_threads": 1, "n_devices": 2}),
        "other_method": replace(wrong, variant="gated"),
    }.items():
        write_record(runs / "another_study" / name, record)
    speeds = measured_speeds(runs)
    per_token = {cell.name: cell.plan.cost.flops_per_token for cell in (small, middle, large)}
    assert per_token[middle.name] ** 2 > per_token[small.name] * per_token[large.name], "the large one is the nearer"
    for cell, rate in ((small, 1e9), (middle, 4e9), (large, 4e9)):
        seconds, guess = estimate(cell.config, cell.plan, speeds)
        assert not guess
        assert seconds == pytest.approx(
            (cell.plan.flops + cell.plan.evaluation_tokens * cell.plan.cost.flops_per_token / 3) / rate, abs=2
        )
