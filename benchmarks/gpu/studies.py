"""The study of `studies.yaml`, in parts, through peerscale's own launcher with several cells at once on the one GPU.

Dense and PEER come first, and small budgets before large ones. The launcher is ended before the time is over; a cell
that is under way then goes on from its last checkpoint in the next call.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from gpu import corpus
from gpu.machine import Machine
from gpu.results import MOST_TRIES, Clock, OutOfTime, Results, Row

from peerscale.config.study import SweepConfig, load_sweep
from peerscale.errors import FAILED_CELLS, UserError
from peerscale.files import PACKAGE, replacing, write_text
from peerscale.records.record import Status
from peerscale.records.table import read_records

STUDY = "gpu"
"""Its name, in DIR/runs and once archived."""

FIRST = ("dense", "peer")

CLOSING_S = 20.0
"""That a launcher which was told to end may take."""

TINY = """\
# Question: does the whole way from study to archive work? No result.
sweep: {methods: [dense, peer], grid: [{budget: 2e8, d_model: [8, 12, 16]}], min_sizes: 1}
defaults: [override data: text, override tracking: disabled]
batch_sequences: 16
context: 8
min_steps: 4
n_layers: 2
"""


def study_file(machine: Machine, folder: Path) -> Path:
    """The study, as it lies among the results."""
    path = folder / f"{STUDY}.yaml"
    if not path.is_file() and machine.rehearse:
        keys = [word.partition("=")[::2] for word in corpus.settings(machine, folder) if word.startswith("data.")]
        inner = [f"{key.removeprefix('data.')}: {value}" for key, value in keys]
        data = ", ".join([*inner, "max_epochs: 100", "evaluation: {validation: 512}"])
        write_text(path, f"{TINY}data: {{{data}}}\n")
    elif not path.is_file():
        with replacing(path) as temporary:
            shutil.copyfile(Path(__file__).with_name("studies.yaml"), temporary)
    return path


def parts(study: SweepConfig) -> list[tuple[str, list[str]]]:
    """The study in parts, in their order: the name of each, and the overrides that choose it."""
    budgets = sorted({row.budget for row in study.grid})
    groups = [[m for m in study.methods if (m in FIRST) is first] for first in (True, False)]
    return [
        (
            f"{', '.join(methods)} at {budget:.0e}",
            [f"sweep.methods=[{','.join(methods)}]", f"sweep.budgets=[{budget:g}]"],
        )
        for methods in groups
        if methods
        for budget in budgets
    ]


def run(machine: Machine, folder: Path, clock: Clock, at_once: int) -> None:
    """Train what is missing; raises `OutOfTime` when it had to be ended, or cells that failed are to be tried again."""
    results, again = Results(folder, "studies"), False
    study = study_file(machine, folder)
    for name, overrides in parts(load_sweep(study)):
        if name in results.rows:
            continue
        if clock.left_s <= 0:
            raise OutOfTime
        print(f"  {name}", flush=True)
        corpus.prepared(machine, folder)
        words = [word for word in corpus.settings(machine, folder) if word.startswith("trainer.")]
        command = [sys.executable, "-m", "peerscale.launch", str(study), *overrides, *words]
        code = ended_in_time([*command, "--launcher", "joblib", "--jobs", str(at_once)], clock)
        if code not in (0, FAILED_CELLS):
            raise UserError(f"the launcher ended with exit code {code}; its message is above")
        failed = code == FAILED_CELLS
        if failed and results.begin(name) < MOST_TRIES:
            print(f"  some cells of {name} failed: the next call tries them once more", flush=True)
            again = True
        else:
            results.add(name, {"failed_cells": failed, **_counted(folder)})
    if again:
        raise OutOfTime
    results.finish()


def ended_in_time(command: list[str], clock: Clock) -> int:
    """The exit code of a launcher; it and its workers are ended when the time is over, and `OutOfTime` is raised."""
    paths = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    process = subprocess.Popen(command, env=environment, process_group=0)
    try:
        return process.wait(max(0.0, clock.left_s - CLOSING_S))
    except subprocess.TimeoutExpired:
        raise OutOfTime from None
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)  # taken as Ctrl-C, so that its workers end too
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(CLOSING_S)
            with contextlib.suppress(ProcessLookupError):  # what did not end by itself
                os.killpg(process.pid, signal.SIGKILL)


def _counted(folder: Path) -> Row:
    """How much of the study is finished by now."""
    done = [record for record in read_records(folder / "runs" / STUDY) if record.status is Status.DONE]
    return {"done_cells": len(done), "done_flops": float(sum(record.budget for record in done))}
