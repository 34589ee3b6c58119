"""A sweep as a job array on a Slurm cluster, by submitit: each job trains a cell, and is requeued at its limit."""

import contextlib
import io
import json
import math
import shutil
import signal
import subprocess
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock

from peerscale.config.errors import hydra_errors
from peerscale.errors import FailedCells, UserError
from peerscale.files import OURS, write_json
from peerscale.plan.cell import Cell
from peerscale.plan.memory import checkpoint_bytes, device_memory
from peerscale.records.record import FAILED

BASE_GB = 2.0
"""Memory of Python, torch and Lightning without a model, in each process."""
GPU_BASE_GB = 6.0
"""The same with CUDA, the compiler and pinned batches."""
CPUS_PER_GPU = 4
"""At least: the process, Lightning's loader, and the threads that compile."""


def load_settings(overrides: Sequence[str] = (), at_once: int | None = None) -> dict[str, Any]:
    """Submitit's parameters from conf/slurm.yaml, changed by the overrides that start with `slurm.`.

    Args:
        overrides: of the sweep.
        at_once: jobs of the array that run at once; None: as the settings say.

    Raises:
        UserError: a wrong setting, or this machine cannot submit jobs.
    """
    from omegaconf import OmegaConf

    if find_spec("submitit") is None:
        raise UserError("Slurm jobs need submitit: .venv/bin/python -m pip install --editable '.[slurm]'")
    if shutil.which("sbatch") is None:
        raise UserError(
            "no sbatch here: submit on a login node of a Slurm cluster (Debian: apt-get install slurm-wlm munge), "
            "or run on this machine: LAUNCHER=joblib"
        )
    settings = OmegaConf.load(OURS / "conf" / "slurm.yaml")
    OmegaConf.set_struct(settings, True)
    with hydra_errors("conf/slurm.yaml"):
        words = [word.lstrip("+") for word in overrides]
        settings.merge_with_dotlist([word for word in words if word.lstrip("~").startswith("slurm.")])
        chosen: Any = OmegaConf.to_container(settings)
    if missing := [key for key in ("timeout_min", "max_num_timeout") if chosen["slurm"][key] is None]:
        raise UserError(f"conf/slurm.yaml: {missing[0]} must be a number: it decides how often a cell is requeued")
    return chosen["slurm"] | ({"array_parallelism": at_once} if at_once else {})


def needs(cells: Sequence[Cell]) -> dict[str, Any]:
    """What a job needs that may run any of these cells.

    Memory of the machine, rounded up to a power of two in GB: on CPUs, for each process that of `device_memory`, its
    state twice because of checkpoints; on GPUs, a checkpoint, which each process reads as a run goes on, and once the
    model that they start from.
    """
    memory_gb, cpus, gpus = 0.0, 0, 0
    for config in (cell.config for cell in cells):
        trainer, memory = config.trainer, device_memory(config)
        if trainer.accelerator == "gpu":
            of_process = GPU_BASE_GB + checkpoint_bytes(config) / 1e9
            memory_gb = max(memory_gb, trainer.devices * of_process + checkpoint_bytes(config) / 1e9 / 3)
            cpus = max(cpus, trainer.devices * max(trainer.threads, CPUS_PER_GPU))
            gpus = max(gpus, trainer.devices)
        else:
            memory_gb = max(memory_gb, trainer.devices * (BASE_GB + (sum(memory.values()) + memory["state"]) / 1e9))
            cpus = max(cpus, trainer.devices * trainer.threads)
    return {"mem_gb": 2 ** math.ceil(math.log2(memory_gb)), "cpus_per_task": cpus, "gpus_per_node": gpus or None}


def submit(cells: Sequence[Cell], settings: dict[str, Any]) -> None:
    """Submit the cells that have no waiting or running job, as one array."""
    sweep, folder = cells[0].sweep, jobs_folder(cells[0])
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):  # two processes that submit at once would submit everything twice
        ids = read_job_ids(folder)
        alive = queued({ids[cell.name] for cell in cells if cell.name in ids})
        free = [cell for cell in cells if ids.get(cell.name) not in alive]
        print(f"{sweep}: {len(cells) - len(free)} cells queued or running in Slurm, {len(free)} to submit")
        if free:
            ids |= zip([cell.name for cell in free], _submit_array(free, settings), strict=True)
            write_json(folder / "jobs.json", ids)
    numbers = sorted({ids[cell.name].partition("_")[0] for cell in cells}, key=int)
    print(
        f"follow:   make status SWEEP={sweep}    or: squeue --jobs={','.join(numbers)}\n"
        f"logs:     {log_path(folder, 'JOB')}\n"
        f"stop:     scancel {' '.join(numbers)}\n"
        f"continue: the same command submits what failed or was stopped, and leaves the rest alone\n"
        f"draw:     make figures SWEEP={sweep}"
    )


def _submit_array(cells: Sequence[Cell], settings: dict[str, Any]) -> list[str]:
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    asked = needs(cells) | {key: value for key, value in settings.items() if value is not None}
    asked |= {
        "job_name": cells[0].sweep,
        "srun_args": [f"--cpus-per-task={asked['cpus_per_task']}"],  # srun no longer takes it from sbatch
        "additional_parameters": {"requeue": True, **asked.get("additional_parameters", {})},
    }
    of_each = f"{asked['mem_gb']} GB, {asked['cpus_per_task']} CPUs, {asked['gpus_per_node'] or 0} GPUs"
    shown = f"{len(cells)} jobs of {of_each}, {asked['timeout_min']} min"
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit both prints and raises sbatch's error
            tries = asked.pop("max_num_timeout")
            executor = submitit.AutoExecutor(jobs_folder(cells[0]), "slurm", slurm_max_num_timeout=tries)
            executor.update_parameters(**{f"slurm_{key}": value for key, value in asked.items()})
            ids = [job.job_id for job in executor.submit_array([CellJob(cell) for cell in cells])]
    except (FailedJobError, FailedSubmissionError, TypeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[-1].removeprefix("sbatch: error: ")
        raise UserError(f"sbatch: {reason} (asked for {shown}; settings: conf/slurm.yaml)") from None
    print(f"  array {ids[0].partition('_')[0]}: {shown}")
    return ids


@dataclass(frozen=True)
class CellJob:
    """What a Slurm job runs: one cell, as planned at submission. Later changes of conf/ have no effect."""

    cell: Cell

    def checkpoint(self) -> Any:
        """What submitit requeues shortly before the time limit: the same job; the cell's folder has its checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def __call__(self) -> None:
        from peerscale.train.run import run_cell

        try:
            status = run_cell(self.cell)
        except KeyboardInterrupt:  # by SIGTERM; Slurm requeues a preempted job that it kills, but none that has ended
            while True:
                signal.pause()
        if status in FAILED:
            raise FailedCells(f"{self.cell.name} {status}; reason: make status SWEEP={self.cell.sweep}")


def jobs_folder(cell: Cell) -> Path:
    """Where the study of a cell keeps its job ids, logs and batch scripts."""
    return cell.folder.parent / "study" / "slurm"


def read_job_ids(folder: Path) -> dict[str, str]:
    """The newest job of each cell that was ever submitted, such as `17_3`, the fourth of array 17."""
    path = folder / "jobs.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def log_path(folder: Path, job_id: str) -> Path:
    """The file of a job's stderr, as named by submitit."""
    return folder / f"{job_id}_0_log.err"


def queued(job_ids: Collection[str]) -> dict[str, tuple[str, str]]:
    """The jobs that have not ended, by id: Slurm's state, such as PENDING, and their node or `(why they wait)`.

    Raises:
        UserError: there is no `squeue`, or it does not answer.
    """
    if not job_ids:
        return {}
    numbers = ",".join(sorted({job.partition("_")[0] for job in job_ids}))
    command = ["squeue", "--array", "--noheader", "--format=%i|%T|%R", f"--jobs={numbers}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"the state of the study's Slurm jobs is not known: {error}") from None
    # Slurm forgets ended jobs after some minutes; a query for a single forgotten job is then an error.
    if answer.returncode and "Invalid job id" not in answer.stderr:
        raise UserError(f"squeue: {answer.stderr.strip().splitlines()[-1:] or answer.returncode}")
    rows = [line.split("|", 2) for line in answer.stdout.splitlines()]
    return {job_id: (state, detail) for job_id, state, detail in rows if job_id in job_ids}
