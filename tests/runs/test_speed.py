"""Estimates of time: a guess at first, then by what was measured on this machine."""

from dataclasses import replace
from pathlib import Path

import pytest

from peerscale.runs.machine import cpu_name
from peerscale.runs.record import Status, write_record
from peerscale.runs.speed import GUESS_FLOPS_PER_S, estimate_s, measured_speeds
from peerscale.sweeper import planned_cells
from toy_study import record_of, write_study


def test_time_is_a_guess_until_a_cell_of_the_method_is_done(tmp_path: Path) -> None:
    file = write_study(tmp_path, "{methods: [dense, peer], grid: [{budget: 1e10, sizes: [d8]}]}")
    dense, peer = planned_cells(file)
    assert dense.estimate_is_guess and peer.estimate_is_guess
    write_record(dense.folder, record_of(dense, Status.DONE, timing={"flops_per_s": 5e8}))
    write_record(dense.folder.parent / "torn", record_of(dense, Status.DONE))
    (dense.folder.parent / "torn/record.json").write_text("{")
    for cell, guess, rate in zip(planned_cells(file), (False, True), (5e8, GUESS_FLOPS_PER_S), strict=True):
        assert cell.estimate_is_guess == guess
        evaluated = cell.plan.evaluation_tokens * cell.plan.cost.flops_per_token / 3
        assert cell.estimate_s == pytest.approx((cell.plan.flops + evaluated) / rate, abs=2)


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
        seconds, guess = estimate_s(cell.config, cell.plan, speeds)
        assert not guess
        assert seconds == pytest.approx(
            (cell.plan.flops + cell.plan.evaluation_tokens * cell.plan.cost.flops_per_token / 3) / rate, abs=2
        )
