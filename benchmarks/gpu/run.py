"""Everything that is to be done on a GPU, once one is there: no network, no installation, calls of ten minutes.

    .venv/bin/python benchmarks/gpu/run.py ceilings correct layer steps resume studies tables archive --out DIR

With nothing installed: PYTHONPATH=src before it, and the machine's own Python, with torch, triton, lightning, numpy,
pandas, scipy, filelock, joblib, tqdm, tokenizers, hydra-core, omegaconf and pydantic; PEER_pytorch and einx to compare
with. The corpus is data/gutenberg-2048. W&B is not needed.

Phases, in this order; `all` is all of them:
    ceilings  versions; rates of copies and of matrix products
    correct   every operator against the definition in float64, a model of each method: right or wrong. What follows
              refuses to run before it is right (unless --anyway). What was wrong stays wrong until the sources
              change, or DIR/correct.json is removed
    layer     each of our kernels; a PEER layer's training step beside PEER-pytorch's
    steps     whole training steps of all methods: FLOP/s and memory
    resume    a cell trained straight, and one broken off and resumed
    studies   benchmarks/gpu/studies.yaml: 75 cells, several at once
    tables    all results as Markdown, also in DIR/tables.md
    archive   DIR/gpu.tar.gz

The same command goes on where the last call stopped, however that ended: what is finished is in DIR. A call ends by
itself before --minutes are over, with exit code 4 if something is left to do; tables and archive are then of what there
is.

With the archive, in a checkout, type
    tar -xzf gpu.tar.gz && make figures SWEEP=gpu && make publish SWEEP=gpu
"""

import os
import signal
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose modules are known as gpu.steps and so on
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from gpu import archive, ceilings, correct, kernels, layer, resume, steps, studies, tables
from gpu.machine import Machine, find_machine
from gpu.results import Clock, OutOfTime, Results, work_off

from peerscale.errors import ArgumentParser, UserError, exit_code

UNFINISHED = 4
"""Exit code: the same command goes on."""

PHASES = ("ceilings", "correct", "layer", "steps", "resume", "studies", "tables", "archive")
CLOSING = ("tables", "archive")
"""Phases that take no time, and so are for what there is when it is over."""

UNTRUSTED = ("ceilings", "correct", *CLOSING)
"""Phases that run whatever `correct` says."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the phases asked for, in their order."""
    parser = ArgumentParser(prog="run.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("phases", nargs="+", metavar="PHASE", help=f"{', '.join(PHASES)}, or all")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results are kept")
    parser.add_argument("--minutes", type=float, default=9.0, help="that this call may take (default: 9)")
    parser.add_argument(
        "--cells", type=int, default=10, metavar="N", help="of `studies` that train at once (default: 10)"
    )
    parser.add_argument("--anyway", action="store_true", help="run phases though `correct` does not say right")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with tiny sizes")
    options = parser.parse_args(arguments)
    if unknown := {*options.phases} - {*PHASES, "all"}:
        raise UserError(f"there is no phase {min(unknown)}; there are: {', '.join(PHASES)}, all")
    clock, folder = Clock(options.minutes), options.out.resolve()
    machine = find_machine(options.rehearse)
    of_one_machine(machine, folder)
    out_of_time, refused = False, ""
    for phase in PHASES:
        if (phase not in options.phases and "all" not in options.phases) or (out_of_time and phase not in CLOSING):
            continue
        right, why = correct.verdict(folder)
        if phase not in UNTRUSTED and not right and not options.anyway:
            refused = refused or f"{phase} does not run, since `correct` says {why}; all the same: --anyway"
            continue
        print(f"{phase}:", flush=True)
        try:
            run_phase(phase, machine, folder, clock, 1 if options.rehearse else options.cells)
        except OutOfTime:
            out_of_time = True
            print(f"{phase} is not finished; what is done is in {folder}, and the same command goes on", flush=True)
    if refused and not out_of_time:
        raise UserError(refused)
    return UNFINISHED if out_of_time else 0


def of_one_machine(machine: Machine, folder: Path) -> None:
    """Refuse results of another device: times of two do not belong into one table."""
    results = Results(folder, "machine")
    before = next(iter(results.rows.values()), None)
    if before is None:
        results.add("machine", {"device": machine.name, "kernel": machine.kernel})
    elif before["device"] != machine.name:
        raise UserError(f"{folder} has results of {before['device']}, and this is {machine.name}: another --out")


def run_phase(phase: str, machine: Machine, folder: Path, clock: Clock, cells_at_once: int) -> None:
    """What is missing of a phase; raises `OutOfTime` before the time is over."""
    match phase:
        case "studies":
            machine.free()  # the cells need it
            studies.run(machine, folder, clock, cells_at_once)
        case "tables":
            print(tables.render(folder))
        case "archive":
            tables.render(folder)
            print(f"  {archive.write(folder)}")
        case _:
            work_off_phase(phase, machine, folder, clock)
    if phase == "correct":
        print(f"  {correct.verdict(folder)[1]}")


def work_off_phase(phase: str, machine: Machine, folder: Path, clock: Clock) -> None:
    """The cases of a phase that measures; `layer` has two tables."""
    match phase:
        case "ceilings":
            work_off(Results(folder, phase), ceilings.cases(machine), clock, machine.free)
        case "correct":
            work_off(Results(folder, phase, correct.stamp()), correct.cases(machine), clock, machine.free)
        case "layer":
            work_off(Results(folder, "kernels"), kernels.cases(machine, folder), clock, machine.free)
            work_off(Results(folder, phase), layer.cases(machine), clock, machine.free)
        case "steps":
            work_off(Results(folder, phase), steps.cases(machine, folder), clock, machine.free)
        case "resume":
            work_off(Results(folder, phase), resume.cases(machine, folder), clock, machine.free)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what was started ends too
    sys.exit(exit_code(main))
