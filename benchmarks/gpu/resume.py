"""Whether a cell that is broken off and goes on in another process ends as one that was trained straight.

Bit for bit is what is hoped for. Where atomic additions sum in no fixed order (the gradients of MoE's and of the
embedding's look-ups, flash attention), two straight runs differ too: so there are two, and their distance stands beside
that of the resumed run.

    run.py resume           starts this file for what is broken off, as a process of its own
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from broken_runs import at_step, flops
from gpu import corpus
from gpu.machine import Machine
from gpu.results import Case, Row

from peerscale.config.schema import composed
from peerscale.plan.cells import Cell, single_cell
from peerscale.records.curves import read_metrics
from peerscale.records.record import Status, read_record
from peerscale.train.run import run_cell

METHODS = ("dense", "peer", "pkm", "moe", "moe_token_choice")
STEPS = 60
"""Of a cell; it is broken off after two thirds of them."""

KILLED = 7
"""Exit code of the process that breaks itself off."""


def cases(machine: Machine, folder: Path) -> Iterator[Case]:
    """One for each method."""
    for method in ("peer",) if machine.rehearse else METHODS:
        yield Case(f"resume {method}", {"method": method}, partial(compare, machine, folder, method))


def words_of(machine: Machine, folder: Path, method: str) -> list[str]:
    """The cell; it leaves six checkpoints."""
    words = [f"ffn={method}", *corpus.settings(machine, folder), "tracking=disabled"]
    if machine.rehearse:
        words += ["d_model=8", "n_layers=2", "batch_sequences=16", "context=8", "data.evaluation.validation=512"]
    else:
        words += ["d_model=256", "head_dim=64", "batch_sequences=64", "context=256", "precision=bf16"]
    words += [f"trainer.checkpoint_every_steps={steps(machine) // 6}", "trainer.log_every_steps=1"]
    words += ["min_steps=2", "data.max_epochs=100"]
    return [*words, f"budget={flops(words, steps(machine)):.10g}"]


def steps(machine: Machine) -> int:
    return 12 if machine.rehearse else STEPS


def cell(machine: Machine, folder: Path, method: str, run: str) -> Cell:
    """A cell of the same configuration in a folder of its own for each run."""
    return single_cell(composed(words_of(machine, folder, method)), run)


def compare(machine: Machine, folder: Path, method: str) -> Row:
    """The largest distance of training and validation losses from those of a straight run."""
    corpus.prepared(machine, folder)
    broken = cell(machine, folder, method, "resumed")
    record = read_record(broken.folder)
    if record is None:
        command = [
            sys.executable,
            __file__,
            json.dumps([machine.type, machine.kernel, machine.rehearse, str(folder), method]),
        ]
        ended = subprocess.run(command, check=False, capture_output=True, text=True)
        record = read_record(broken.folder)
        if record is None or ended.returncode != KILLED:
            return {"reason": f"the process to be broken off failed: {ended.stderr.strip()[-200:]}"}
    losses = {}
    for run in ("resumed", "straight", "straight again"):
        one = cell(machine, folder, method, run.replace(" ", "_"))
        if run_cell(one) is not Status.DONE:
            return {"reason": f"the {run} run did not end well"}
        losses[run] = _losses(one)
    distance = {run: max(abs(a - b) for a, b in zip(losses[run], losses["straight"], strict=True)) for run in losses}
    return {
        "losses": len(losses["straight"]),
        "resumed_from_straight": distance["resumed"],
        "straight_from_straight": distance["straight again"],
        "same_bits": losses["resumed"] == losses["straight"],
        "verdict": _verdict(distance["resumed"], distance["straight again"]),
    }


def _losses(one: Cell) -> list[float]:
    record = read_record(one.folder)
    assert record is not None
    return [*(row["loss"] for row in read_metrics(one.folder)), *record.sequence_losses]


def _verdict(resumed: float, straight: float) -> str:
    if resumed == 0:
        return "bit for bit the same"
    if straight == 0:
        return "differs, though two straight runs agree bit for bit: by the checkpoint"
    return f"differs {resumed / straight:.2g} times as far as two straight runs: sums in no fixed order"


def break_off(machine: Machine, folder: Path, method: str) -> None:
    """Train, and end after two thirds of the steps as a killed process does."""
    at_step(steps(machine) * 2 // 3, lambda: os._exit(KILLED))
    run_cell(cell(machine, folder, method, "resumed"))


if __name__ == "__main__":
    kind, kernel, rehearse, where, which = json.loads(sys.argv[1])
    break_off(Machine(kind, kernel, rehearse), Path(where), which)
