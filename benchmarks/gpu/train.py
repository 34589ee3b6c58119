"""Whole runs: whether one that is broken off ends as one that was trained straight, and a short study, `gpu.yaml`."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from broken_runs import flops, write_text
from gpu.machine import Machine
from gpu.results import Case, Clock, OutOfTime, Row

from peerscale.config.compose import composed
from peerscale.config.schema import load
from peerscale.data.prepare import prepare
from peerscale.errors import FAILED_CELLS, UserError
from peerscale.files import PACKAGE
from peerscale.plan.cell import Cell
from peerscale.plan.cells import single_cell
from peerscale.records.curves import read_metrics
from peerscale.records.record import Status, read_record
from peerscale.records.table import read_records
from peerscale.train.run import run_cell

STUDY = Path(__file__).with_name("gpu.yaml")
KILLED = 7
"""Exit code of a process that breaks itself off."""
PARTS = [(methods, budget) for methods in ("dense,peer", "moe_token_choice,pkm") for budget in ("1e15", "1e16")]
TINY = ["n_layers=2", "context=8", "batch_sequences=16", "min_steps=2", "data.evaluation.validation=512"]
"""Of a rehearsal."""


def settings(machine: Machine, folder: Path) -> list[str]:
    """Overrides of all runs: where they are kept, on what they run, and in a rehearsal a made-up text. The corpus is
    there afterwards; raises `UserError` if it is not, and cannot be made without a network."""
    words = [f"trainer.runs_directory={folder / 'runs'}", f"trainer.kernel={machine.kernel}"]
    words += ["trainer.accelerator=cpu", *TINY] if machine.rehearse else ["trainer.accelerator=gpu"]
    if machine.rehearse:
        text = folder / "rehearsal.txt"
        if not text.is_file():
            write_text(text)
        words += ["data=text", f"data.path={text}", f"data.directory={folder / 'data'}", "data.vocab_size=300"]
    prepare(load([*words, "budget=1e12"]).data)
    return [*words, "data.max_epochs=100"]


def resume(machine: Machine, folder: Path) -> Iterator[Case]:
    """Where additions have no fixed order, two straight runs differ too, so there are two of them."""
    for method in ("peer", "moe_token_choice")[: 1 if machine.rehearse else None]:
        yield Case("resume", method, {"method": method}, partial(compare, machine, folder, method))


def cell(machine: Machine, folder: Path, method: str, run: str) -> Cell:
    """A cell of 12 or 60 steps, with six checkpoints, in a folder of its own for each run."""
    n_steps, words = 60, "d_model=256 head_dim=64 batch_sequences=64 context=256 precision=bf16"
    if machine.rehearse:
        n_steps, words = 12, "d_model=8 precision=bf16"
    saving = f"trainer.checkpoint_every_steps={n_steps // 6} trainer.log_every_steps=1 min_steps=2 tracking=disabled"
    words = [f"ffn={method}", *settings(machine, folder), *words.split(), *saving.split()]
    return single_cell(composed([*words, f"budget={flops(words, n_steps):.10g}"]), run)


def compare(machine: Machine, folder: Path, method: str) -> Row:
    """The largest distance of training and validation losses from those of a straight run."""
    n_steps = cell(machine, folder, method, "resumed").plan.steps
    if read_record(cell(machine, folder, method, "resumed").folder) is None:
        code = f"import os, sys; sys.path[:0] = {sys.path!r}; from broken_runs import at_step; "
        code += f"from gpu.train import *; at_step({n_steps * 2 // 3}, lambda: os._exit({KILLED})); "
        code += f"run_cell(cell({machine!r}, Path({str(folder)!r}), {method!r}, 'resumed'))"
        ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
        if ended.returncode != KILLED:
            return {"reason": f"the process to be broken off failed: {ended.stderr.strip()[-200:]}"}
    losses = {}
    for run in ("resumed", "straight", "straight_again"):
        one = cell(machine, folder, method, run)
        if run_cell(one) is not Status.DONE:
            return {"reason": f"the {run} run did not end well"}
        record = read_record(one.folder)
        losses[run] = [*(row["loss"] for row in read_metrics(one.folder)), *(record.sequence_losses if record else [])]
    away = {run: max(abs(a - b) for a, b in zip(losses[run], losses["straight"], strict=True)) for run in losses}
    return {"resumed_from_straight": away["resumed"], "straight_from_straight": away["straight_again"]}


def study(machine: Machine, folder: Path, clock: Clock, at_once: int) -> Iterator[Case]:
    """The parts of the study, in their order; a part that is broken off goes on in the next call."""
    for methods, budget in PARTS[: 1 if machine.rehearse else None]:
        yield Case(
            "study", f"{methods} at {budget}", {}, partial(part, machine, folder, clock, at_once, methods, budget)
        )


def part(machine: Machine, folder: Path, clock: Clock, at_once: int, methods: str, budget: str) -> Row:
    """Train a part through the launcher, several cells at once on the one GPU; raises `OutOfTime` when it is over."""
    name, words = STUDY, settings(machine, folder)
    if machine.rehearse:  # a study of its own, since a study's file settles sizes and budgets
        text = "# Question: does the whole way work? No result.\nsweep: {methods: [dense, peer], min_sizes: 1,\n"
        text += "  grid: [{budget: 2e8, d_model: [8, 12]}]}\ndefaults: [override data: text]\nprecision: bf16\n"
        name, budget = folder / "gpu.yaml", "2e8"
        name.write_text(text, encoding="utf-8")
    words += [f"sweep.methods=[{methods}]", f"sweep.budgets=[{budget}]"]
    words = [word for word in words if word not in ("data=text", "data.max_epochs=100" * (not machine.rehearse))]
    command = [sys.executable, "-m", "peerscale.launch", str(name), *words, "tracking=disabled"]
    code = ended_in_time([*command, "--launcher", "joblib", "--jobs", str(at_once)], clock)
    if code not in (0, FAILED_CELLS):
        raise UserError(f"the launcher ended with exit code {code}; its message is above")
    done = [record for record in read_records(folder / "runs" / "gpu") if record.status is Status.DONE]
    return {"done_cells": len(done), "done_flops": float(sum(record.budget for record in done))}


def ended_in_time(command: list[str], clock: Clock) -> int:
    """The exit code of a launcher; when the time is over, it and its workers are killed, and `OutOfTime` is raised."""
    paths = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    process = subprocess.Popen(command, env=environment, process_group=0)
    try:
        return process.wait(max(0.0, clock.left_s))
    except subprocess.TimeoutExpired:
        raise OutOfTime from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # checkpoints are atomic
