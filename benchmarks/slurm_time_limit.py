"""A cell longer than its Slurm time limit: stopped and requeued, it must end like one that was never stopped.

Takes five minutes. Starts a one-node Slurm of its own on this machine. Slurm counts time limits in minutes and checks
them every half a minute, so each slice trains for 15 to 45 seconds.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from broken_runs import check

from peerscale.launch.slurm import jobs_folder, load_settings, read_job_ids, submit
from peerscale.plan.cells import Cell, planned_cells
from peerscale.records.curves import read_metrics
from peerscale.records.record import Record, Status, read_record
from peerscale.train.run import run_cell
from slurm_cluster import ask, missing, one_node_slurm, trainable_study

TRAINING_S = 100.0
"""Of the unbroken cell: three slices or more, since none trains for longer than 45 seconds."""


def in_slices(folder: Path) -> tuple[int, str, int]:
    """Train a cell in slices of one minute and, for comparison, in one go.

    Returns:
        Times that it was cut off, what came of it, and the rows of metrics that differ.
    """
    if reason := missing():
        return 0, f"skipped: {reason}", 0
    steps = 400
    speed = steps / _train_here(_cell(trainable_study(folder / "speed", steps))).timing["wall_s"]
    study = trainable_study(folder / "study", round(TRAINING_S * speed))
    cell, unbroken = _cell(study), _cell(study, f"trainer.runs_directory={folder / 'unbroken'}")
    overrides = ["timeout_min=1", "signal_delay_s=10", "mem_gb=1"]
    with one_node_slurm(folder / "slurm"):
        submit([cell], load_settings([f"slurm.{override}" for override in overrides]))
        reference = _train_here(unbroken)
        while ask("squeue", "--noheader"):
            time.sleep(1)
        job = read_job_ids(jobs_folder(cell))[cell.name]
        requeued = (jobs_folder(cell) / f"{job}_0_log.out").read_text().count("Requeued job")
    record = read_record(cell.folder)
    check(record is not None and record.status is Status.DONE, f"the cell ended as {record and record.status}")
    check(requeued >= 2, f"{requeued + 1} slices only")
    check(record is not None and record.sequence_losses == reference.sequence_losses, "other losses than unbroken")
    here, there = _losses(cell), _losses(unbroken)
    return requeued, f"{requeued + 1} slices, same losses as unbroken", len(set(there.items()) ^ set(here.items()))


def _cell(study: Path, *overrides: str) -> Cell:
    """The study's long dense cell."""
    return planned_cells(study, overrides)[1]


def _train_here(cell: Cell) -> Record:
    run_cell(cell)
    record = read_record(cell.folder)
    assert record is not None and record.status is Status.DONE, record
    return record


def _losses(cell: Cell) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_metrics(cell.folder)}
