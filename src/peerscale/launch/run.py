"""Run the cells of a study that are not done yet, on this machine or as Slurm jobs.

python -m peerscale.launch SWEEP [key=value ...] [--launcher joblib --jobs 4]

Failed cells do not stop the others. Exit codes: `peerscale.errors`.
"""

import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

from peerscale.data.prepare import prepare
from peerscale.data.store import read_manifest
from peerscale.errors import ArgumentParser, FailedCells, UserError, positive_integer
from peerscale.launch.processes import run_at_once
from peerscale.plan.cell import Cell
from peerscale.plan.cells import planned_cells
from peerscale.plan.notices import evaluation_lines, rate_lines
from peerscale.records.matching import some
from peerscale.records.outcome import FINISHED, how_to_rerun, outcomes
from peerscale.records.record import FAILED, Status
from peerscale.train.progress import Progress
from peerscale.train.run import run_cell

LAUNCHERS = ("local", "joblib", "slurm")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m peerscale.launch", description=__doc__.splitlines()[0])
    parser.add_argument("sweep", help="name of a file in sweeps/, or a path")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="overrides of every cell")
    parser.add_argument(
        "--launcher", choices=LAUNCHERS, default="local", help="this process, several processes, or Slurm jobs"
    )
    at_once = "cells that run at once (default: one, or Slurm's limit)"
    parser.add_argument("--jobs", type=positive_integer, metavar="N", help=at_once)
    parser.add_argument("--keep-going", action="store_true", help="exit code 0 also if some cells failed")
    options = parser.parse_intermixed_args(arguments)
    slurm = slurm_settings(options.launcher, options.overrides, options.jobs)
    cells = planned_cells(options.sweep, options.overrides)
    was_there = read_manifest(cells[0].config.data)
    if prepare(cells[0].config.data).manifest != was_there:  # the sizes of its sets decide which cells are dropped
        cells = planned_cells(options.sweep, options.overrides)
    sweep, found = cells[0].sweep, outcomes(cells)
    study = f"SWEEP={sweep}" + f" OVERRIDES={shlex.quote(shlex.join(options.overrides))}" * bool(options.overrides)
    if refused := [outcome.refused for outcome in found if outcome.refused]:
        several = f"{len(refused)} cells are refused, which make status {study} lists; the first: "
        raise UserError(several * (len(refused) > 1) + refused[0])
    if all(outcome.status is Status.DROPPED for outcome in found):
        raise UserError(f"all {len(cells)} cells are dropped, {cells[0].name} since: {cells[0].plan.reason}")
    # Longest first, so that the last ones to finish are short.
    pending = [outcome.cell for outcome in found if outcome.status not in FINISHED]
    pending.sort(key=lambda cell: -cell.plan.flops)
    n = Counter(outcome.status for outcome in found)
    counts = f"{n[Status.DONE]} done, {n[Status.DROPPED]} dropped, {len(pending)} to run"
    print(f"{sweep}: {len(cells)} cells, {counts}", file=sys.stderr)
    for line in [*evaluation_lines(cells, short_only=True), *rate_lines(cells)]:
        print(f"notice: {line}", file=sys.stderr)
    failed = []
    for outcome in found:
        if outcome.record and outcome.status is Status.DIVERGED:
            anyway = how_to_rerun(outcome.cell, outcome.status)
            print(f"{outcome.cell.name} diverged: {outcome.record.reason}; {anyway}", file=sys.stderr)
            failed.append(outcome.cell.name)
    if pending and slurm:
        run_missing(pending, options.launcher, options.jobs, slurm)
    elif pending:
        statuses = run_missing(pending, options.launcher, options.jobs, already_done=n[Status.DONE])
        failed = [name for name, status in statuses.items() if status in FAILED] + failed
        if Status.RUNNING in statuses.values():
            print(f"some cells are being run by another process: make status {study}", file=sys.stderr)
        elif not failed:
            print(f"all cells are done; next: make figures {study}", file=sys.stderr)
    elif not failed:
        print(f"nothing to run; next: make figures {study}", file=sys.stderr)
    if failed:
        names = some(failed)
        message = f"{len(failed)} of {len(cells)} cells failed: {names}; reasons: make status {study}"
        if not options.keep_going:
            raise FailedCells(message)
        print(f"error: {message}", file=sys.stderr)
    return 0


def slurm_settings(launcher: str, overrides: Sequence[str], jobs: int | None) -> dict[str, Any]:
    """Slurm's settings, read before a corpus is prepared in case nothing can be submitted; empty without Slurm."""
    if launcher != "slurm":
        return {}
    from peerscale.launch import slurm

    return slurm.load_settings(overrides, jobs)


def run_missing(
    cells: Sequence[Cell],
    launcher: str,
    jobs: int | None,
    slurm: dict[str, Any] | None = None,
    already_done: int = 0,
) -> dict[str, Status]:
    """Run cells of one study here, or submit them to Slurm; returns the statuses of those that ran here, by name."""
    if launcher == "slurm":
        from peerscale.launch import slurm as cluster

        cluster.submit(cells, slurm or {})
        return {}
    with Progress(cells[0].sweep, cells, already_done=already_done):
        if launcher == "joblib" or jobs:
            return run_at_once(cells, jobs or 1, run_cell)
        return {cell.name: run_cell(cell) for cell in cells}
