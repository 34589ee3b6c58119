"""Run the cells of a study that are not done yet, on this machine or as Slurm jobs.

python -m peerscale.launch SWEEP [key=value ...] [--launcher joblib --jobs 4]

Failed cells do not stop the others. Exit codes: `peerscale.errors`.
"""

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from peerscale.config.compose import study_files, sweep_file
from peerscale.data.prepare import prepare
from peerscale.data.store import read_manifest
from peerscale.errors import ArgumentParser, FailedCells, UserError
from peerscale.launch.outcomes import published_as_done, published_study, some
from peerscale.launch.progress import Progress
from peerscale.plan.cells import Cell, pending_cells, planned_cells
from peerscale.plan.notices import diverged_lines, evaluation_lines, rate_lines
from peerscale.plan.plan import Verdict
from peerscale.records.record import FAILED, Status
from peerscale.train.distributed import started_ranks
from peerscale.train.run import run_in_turn

LAUNCHERS = ("local", "joblib", "slurm")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m peerscale.launch", description=__doc__.splitlines()[0])
    parser.add_argument("sweep", help="name of a file in sweeps/, or a path")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="overrides of every cell")
    parser.add_argument(
        "--launcher", choices=LAUNCHERS, default="local", help="this process, several processes, or Slurm jobs"
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="cells that run at once (default: one, or Slurm's limit)")
    parser.add_argument("--published", type=Path, metavar="DIR", help="count cells finished in this folder as done")
    options = parser.parse_intermixed_args(arguments)
    if options.jobs is not None and options.jobs < 1:
        raise UserError(f"--jobs must be at least 1, not {options.jobs}")
    if started_ranks()[1] > 1:
        raise UserError("torchrun and srun start the ranks of one cell; a study starts the ranks of its cells itself")
    settings = None
    if options.launcher == "slurm":
        from peerscale.launch.submission import submission_settings

        # Checked before the corpus is prepared, in case nothing can be submitted.
        settings = submission_settings(options.overrides, options.jobs)
    cells = planned_cells(options.sweep, options.overrides)
    name = cells[0].sweep
    study = published_study(name, options.published) if options.published else None
    was_there = read_manifest(cells[0].config.data)
    manifest = prepare(cells[0].config.data).manifest
    if manifest != was_there:  # the sizes of its sets decide which cells are dropped
        cells = planned_cells(options.sweep, options.overrides)
    corpus = manifest.fingerprint
    elsewhere = published_as_done(cells, study, corpus) if study else set()
    left = [cell for cell in cells if cell.name not in elsewhere]
    pending, diverged = pending_cells(left, corpus), diverged_lines(left, corpus)
    dropped = sum(cell.plan.verdict is Verdict.DROP for cell in left)
    done = len(cells) - len(pending) - dropped - len(diverged)
    published = f" ({len(elsewhere)} of them published)" if elsewhere else ""
    counts = f"{done} done{published}, {dropped} dropped, {len(pending)} to run"
    print(f"{name}: {len(cells)} cells, {counts}", file=sys.stderr)
    notices = [f"notice: {line}" for line in [*evaluation_lines(cells, short_only=True), *rate_lines(cells)]]
    print(*(f"{line}\n" for line in notices + diverged), sep="", end="", file=sys.stderr)
    if pending and settings:
        from peerscale.launch.submission import submit

        submit(pending, settings)
    statuses: dict[str, Status] = {}
    if pending and not settings:
        with Progress(name, pending, already_done=done):
            statuses = run_here(pending, options.jobs or 1 if options.launcher == "joblib" else None)
    failed = [cell for cell, status in statuses.items() if status in FAILED]
    failed += [line.partition(" ")[0] for line in diverged]
    if failed:
        raise FailedCells(
            f"{len(failed)} of {len(cells)} cells failed: {some(failed)}; reasons: make status SWEEP={name}"
        )
    if pending and settings:
        return 0
    draw = f"make figures SWEEP={name}{' PUBLISHED=1' if elsewhere else ''}"
    if (file := sweep_file(options.sweep)) not in map(Path.resolve, study_files()):
        draw += f" (first copy {file} to sweeps/, where it looks for studies)"
    if Status.RUNNING in statuses.values():
        print(f"some cells are being run by another process: make status SWEEP={name}", file=sys.stderr)
    else:
        print(f"{'all cells are done' if pending else 'nothing to run'}; next: {draw}", file=sys.stderr)
    return 0


def run_here(cells: Sequence[Cell], n_processes: int | None) -> dict[str, Status]:
    """Run cells on this machine, `n_processes` at once, or one after the other in this process; returns their statuses.

    Raises:
        UserError: a cell cannot be run as it is; running cells stop as on Ctrl-C.
        FailedCells: one of the processes was killed.
    """
    groups = [[cell] for cell in cells]
    if n_processes is None:
        statuses = [run_in_turn(group) for group in groups]
    else:
        from joblib import Parallel, delayed
        from joblib.externals.loky.process_executor import TerminatedWorkerError

        with _terminated_as_by_ctrl_c():
            try:
                statuses = Parallel(n_jobs=n_processes, batch_size=1)(
                    delayed(_run_as_worker)(group) for group in groups
                )
            except TerminatedWorkerError:
                raise FailedCells(
                    "a process was killed, perhaps since memory ran out, and the others were stopped; the same command "
                    "continues every cell from its checkpoint; fewer at once need less memory: JOBS=1"
                ) from None
    return {name: status for group in statuses for name, status in group.items()}


def _run_as_worker(cells: Sequence[Cell]) -> dict[str, Status]:
    """Run cells in one of several processes, each of which has its own GPUs if there are any."""
    from peerscale.train.gpus import take_gpus

    if cells[0].config.trainer.accelerator != "cpu":
        take_gpus(cells[0].config.trainer.devices)
    return run_in_turn(cells)


@contextmanager
def _terminated_as_by_ctrl_c() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C, since the worker processes would otherwise keep running."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
