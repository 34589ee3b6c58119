"""A study's jobs on a Slurm cluster: the resources of a cell, the job that runs it, and the state of that job."""

import json
import math
import subprocess
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass

from peerscale.config.compose import of_section
from peerscale.config.errors import parse
from peerscale.config.schema import composed
from peerscale.errors import UserError
from peerscale.files import write_text
from peerscale.plan.cells import Cell
from peerscale.types import STRICT, Positive, Rate, Whole

BASE_GB = 2.0
"""Memory of Python, torch and Lightning without a model, in each process."""

SHORTEST_MIN = 10
"""The shortest time limit. The next ones double it, so that the jobs of a study fall into few classes."""

STARTING_MIN = 2.0
"""Time for imports from a shared disk and for compiling."""


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class SlurmConfig:
    """Settings for Slurm; conf/slurm.yaml has defaults and meanings."""

    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    array_parallelism: Positive
    cpus_per_task: Positive | None
    gpus_per_node: Whole | None
    mem_gb: Rate | None
    timeout_min: Positive | None
    time_factor: Rate
    max_timeout_min: Positive
    signal_delay_s: Positive
    max_num_timeout: Whole
    setup: list[str]
    additional_parameters: dict[str, Any] | None

    def __post_init__(self) -> None:
        limit = self.timeout_min or min(SHORTEST_MIN, self.max_timeout_min)
        if self.signal_delay_s >= 60 * limit:
            raise ValueError(f"signal_delay_s {self.signal_delay_s} leaves no time within a limit of {limit} min")


def load_settings(overrides: Sequence[str] = ()) -> SlurmConfig:
    """conf/slurm.yaml, changed by the overrides that start with `slurm.`; raises `ConfigError`."""
    chosen = [f"++{override.lstrip('+')}" for override in overrides if of_section(override, "slurm")]
    return parse(TypeAdapter(SlurmConfig), SlurmConfig, composed(chosen, name="slurm").tree["slurm"], "slurm")


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Resources:
    """The resources that a job asks for; cells with the same resources make one job array."""

    time_min: int
    mem_gb: float
    cpus: int
    gpus: int

    def __str__(self) -> str:
        gpus = f", {self.gpus} GPU" if self.gpus else ""
        return f"{self.cpus} CPU{gpus}, {self.mem_gb:g} GB, {self.time_min} min"


def resources(cells: Sequence[Cell], settings: SlurmConfig) -> Resources:
    """The resources of a job of one cell, or of several of one model: from `settings`, or else from the plan.

    Memory: 32 bytes per parameter for each device's process (fp32 weight, gradient and two moments, and the same again
    for a checkpoint and copies) and 16 per logit (logits, their softmax and both gradients), rounded up to a power of
    two in GB.
    """
    config, plan = cells[0].config, cells[0].plan
    of_process = BASE_GB + 32 * plan.cost.params_total / 1e9
    of_logits = 16 * config.tokens_per_step * config.data.vocab_size / 1e9  # the processes share the batch
    memory = config.trainer.devices * of_process + of_logits
    minutes = STARTING_MIN + settings.time_factor * sum(cell.estimate_s for cell in cells) / 60
    on_gpus = config.trainer.accelerator == "gpu"
    limit = SHORTEST_MIN * 2 ** max(0, math.ceil(math.log2(minutes / SHORTEST_MIN)))
    return Resources(
        time_min=settings.timeout_min or min(limit, settings.max_timeout_min),
        mem_gb=settings.mem_gb or 2 ** math.ceil(math.log2(memory)),
        cpus=settings.cpus_per_task or config.trainer.threads * config.trainer.devices,
        gpus=on_gpus * config.trainer.devices if settings.gpus_per_node is None else settings.gpus_per_node,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A job as Slurm reports it."""

    id: str
    """Such as `17_3`, the fourth of array 17."""
    state: str = ""
    """Slurm's state: PENDING, RUNNING, COMPLETING ...; empty once the job has ended."""
    detail: str = ""
    """Its nodes, or the reason why it waits, in parentheses."""

    @property
    def word(self) -> str:
        """Its state in the grid of `make status`."""
        return "queued" if self.state == "PENDING" else "running"


def jobs_folder(cell: Cell) -> Path:
    """Where the study of a cell keeps its job ids, logs and batch scripts."""
    return cell.folder.parent / "study" / "slurm"


def read_job_ids(folder: Path) -> dict[str, str]:
    """The newest job of each cell that was ever submitted, such as `17_3`."""
    path = folder / "jobs.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}


def write_job_ids(folder: Path, ids: Mapping[str, str]) -> None:
    write_text(folder / "jobs.json", json.dumps(ids, indent=1) + "\n")


def log_path(folder: Path, job_id: str) -> Path:
    """The file of a job's stderr, as named by submitit."""
    return folder / f"{job_id}_0_log.err"


def queued(job_ids: Collection[str]) -> dict[str, Job]:
    """The jobs that have not ended, by id.

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
        lines = answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"]
        raise UserError(f"squeue: {lines[-1]}")
    wanted = set(job_ids)
    rows = [line.split("|", 2) for line in answer.stdout.splitlines()]
    return {job_id: Job(id=job_id, state=state, detail=detail) for job_id, state, detail in rows if job_id in wanted}
