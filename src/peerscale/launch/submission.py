"""Submit cells as Slurm job arrays with submitit; and the program that runs in such a job."""

import contextlib
import io
import itertools
import math
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from types import FrameType
from typing import Any

from filelock import FileLock

from peerscale.errors import FailedCells, UserError, exit_code
from peerscale.launch.slurm import (
    Resources,
    SlurmConfig,
    jobs_folder,
    load_settings,
    log_path,
    queued,
    read_job_ids,
    resources,
    write_job_ids,
)
from peerscale.plan.cells import Cell
from peerscale.records.record import FAILED

AS_SUBMITIT = ("partition", "account", "qos", "constraint", "array_parallelism", "signal_delay_s")
"""Settings that have the same names in submitit."""


def submission_settings(overrides: Sequence[str], jobs: int | None) -> SlurmConfig:
    """conf/slurm.yaml, changed by the overrides of a study that start with `slurm.`.

    Args:
        overrides: of the study.
        jobs: number of jobs of an array that run at once; None: as the settings say.

    Raises:
        UserError: a wrong setting, or this machine cannot submit jobs.
    """
    if find_spec("submitit") is None:
        raise UserError("Slurm jobs need submitit: .venv/bin/python -m pip install --editable '.[slurm]'")
    if shutil.which("sbatch") is None:
        raise UserError(
            "no sbatch here: submit on a login node of a Slurm cluster (Debian: apt-get install slurm-wlm munge), "
            "or run on this machine: LAUNCHER=joblib"
        )
    return load_settings([*overrides, *([f"slurm.array_parallelism={jobs}"] if jobs else [])])


def submit(cells: Sequence[Cell], settings: SlurmConfig) -> None:
    """Submit the cells that have no waiting or running job, one array for each class of resources."""
    sweep, folder = cells[0].sweep, jobs_folder(cells[0])
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):  # two processes that submit at once would submit everything twice
        ids = read_job_ids(folder)
        alive = queued({ids[cell.name] for cell in cells if cell.name in ids})
        free = [cell for cell in cells if ids.get(cell.name) not in alive]
        print(f"{sweep}: {len(cells) - len(free)} cells queued or running in Slurm, {len(free)} to submit")
        needs = [(resources(group, settings), group) for group in ([cell] for cell in free)]
        longest_first = sorted(needs, key=lambda pair: pair[0], reverse=True)
        for need, pairs in itertools.groupby(longest_first, key=lambda pair: pair[0]):
            groups = [group for _, group in pairs]
            job_ids = _submit_array(groups, need, settings)
            ids |= {cell.name: job for group, job in zip(groups, job_ids, strict=True) for cell in group}
            write_job_ids(folder, ids)
            print(f"  job {_number(job_ids[0])}: {len(groups)} x {need}")
    numbers = sorted({_number(ids[cell.name]) for cell in cells}, key=int)
    print(
        f"follow:   make status SWEEP={sweep}    or: squeue --jobs={','.join(numbers)}\n"
        f"logs:     {log_path(folder, 'JOB')}\n"
        f"stop:     scancel {' '.join(numbers)}\n"
        f"continue: the same command submits what failed or was stopped, and leaves the rest alone\n"
        f"draw:     make figures SWEEP={sweep}"
    )


def _number(job_id: str) -> str:
    """The number of a job's array, such as `17` for `17_3`."""
    return job_id.partition("_")[0]


def _submit_array(groups: Sequence[Sequence[Cell]], need: Resources, settings: SlurmConfig) -> list[str]:
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    asked = {
        **{name: getattr(settings, name) for name in AS_SUBMITIT},
        "job_name": groups[0][0].sweep,
        "time": need.time_min,
        "mem": f"{math.ceil(need.mem_gb * 1024)}M",
        "cpus_per_task": need.cpus,
        "gpus_per_node": need.gpus or None,
        "setup": settings.setup or None,
        "srun_args": [f"--cpus-per-task={need.cpus}"],  # srun no longer takes it from sbatch
        "additional_parameters": {"requeue": True, **(settings.additional_parameters or {})},
    }
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit both prints and raises sbatch's error
            executor = submitit.SlurmExecutor(jobs_folder(groups[0][0]), max_num_timeout=settings.max_num_timeout)
            executor.update_parameters(**{key: value for key, value in asked.items() if value is not None})
            return [job.job_id for job in executor.submit_array([CellJob(cells=group) for group in groups])]
    except (FailedJobError, FailedSubmissionError) as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[-1].removeprefix("sbatch: error: ")
        raise UserError(f"sbatch: {reason} (asked for {need}; settings: conf/slurm.yaml)") from None


@dataclass(frozen=True, kw_only=True, slots=True)
class CellJob:
    """What a Slurm job runs: cells as planned at submission. Later changes of conf/ have no effect."""

    cells: Sequence[Cell]

    def checkpoint(self) -> Any:
        """What submitit requeues: the same job, since the cell's folder holds its checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def __call__(self) -> None:
        if code := exit_code(self._run):
            sys.exit(code)

    def _run(self) -> None:
        """Run the cells. On Slurm's warning signal, stop after the current step, save a checkpoint and requeue."""
        from submitit.slurm.slurm import SlurmJobEnvironment

        from peerscale.train.run import run_in_turn

        warning = signal.Signals[f"SIG{SlurmJobEnvironment.USR_SIG}"]
        requeue, ignore_term = signal.getsignal(warning), signal.getsignal(signal.SIGTERM)
        assert callable(requeue)
        warned = False

        def stop_training(number: int, frame: FrameType | None) -> None:
            nonlocal warned
            warned = True
            if signal.getsignal(signal.SIGTERM) is ignore_term:  # not in training, so there is nothing to save
                requeue(number, frame)
            signal.raise_signal(signal.SIGTERM)  # makes Lightning stop after the step

        signal.signal(warning, stop_training)
        try:
            statuses = run_in_turn(self.cells)
            failed = [f"{name} {status}" for name, status in statuses.items() if status in FAILED]
            if failed:
                raise FailedCells(f"{', '.join(failed)}; reason: make status SWEEP={self.cells[0].sweep}")
        except KeyboardInterrupt:
            signal.signal(warning, requeue)
            if warned:
                requeue(warning, None)
            # Slurm is about to take the node. It requeues a preempted job that it kills, but not one that has ended.
            while True:
                signal.pause()
