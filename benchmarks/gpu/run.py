"""Everything that is to be done on a GPU, once one is there: four calls of at most nine minutes, without a network.

    .venv/bin/python benchmarks/gpu/run.py 1 --out DIR                       on the machine with the GPU
    .venv/bin/python benchmarks/gpu/run.py 2 --out NEW --from DIR/gpu.tar.gz on the next one, which is bare

With nothing installed: PYTHONPATH=src before it, and a Python with what pyproject.toml asks for (W&B is not needed); to
compare with, PEER_pytorch. The corpus is data/gutenberg-2048.

Calls, and what they are expected to take (no GPU has run them; a call ends by itself before --minutes are over):
    1  ceilings; every operator against its definition in float64, and a model of each method     5 to 9 minutes
    2  kernels at sizes of the paper; a PEER layer's training step beside PEER-pytorch's          6 to 9 minutes
    3  whole training steps of all methods, the paper's cell among them; a resumed run            7 to 9 minutes
    4  a study, gpu.yaml, several cells at once                                                   9 minutes
    report  report.md and report.png once more, from what there is

After every call DIR holds results.json, the report, and gpu.tar.gz, with which the next one goes on. Exit code 4: the
same call goes on with what is left. Calls 2 to 4 refuse to run before call 1 found every operator right (but --anyway).
"""

import os
import signal
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose modules are known as gpu.speed and so on
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from gpu import correct, report, speed, train
from gpu.machine import Machine
from gpu.results import Clock, OutOfTime, Results, archive, restore, work_off

from peerscale.errors import ArgumentParser, UserError, exit_code

UNFINISHED = 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one call."""
    parser = ArgumentParser(prog="run.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("call", choices=["1", "2", "3", "4", "report"])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results are kept")
    parser.add_argument("--from", dest="archive", type=Path, metavar="ARCHIVE", help="gpu.tar.gz of the call before")
    parser.add_argument("--minutes", type=float, default=9.0, help="that this call may take (default: 9)")
    parser.add_argument("--cells", type=int, default=4, metavar="N", help="of call 4 that train at once (default: 4)")
    parser.add_argument("--anyway", action="store_true", help="run though call 1 does not say right")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with tiny sizes")
    options = parser.parse_args(arguments)
    clock, folder = Clock(options.minutes), options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
    if options.archive:
        restore(options.archive, folder)
    machine = Machine("cpu", "torch", True) if options.rehearse else Machine()  # the interpreter would take minutes
    if not options.rehearse and not torch.cuda.is_available():
        raise UserError("torch sees no GPU here; to go through everything on a CPU: --rehearse")
    results = Results(folder, machine.name)
    right, why = correct.verdict(results)
    if options.call in ("2", "3", "4") and not right and not options.anyway:
        raise UserError(f"call {options.call} does not run, since of call 1 is known: {why}; all the same: --anyway")
    try:
        run_call(options.call, machine, results, clock, options.cells)
        return 0
    except OutOfTime:
        print(f"call {options.call} is not finished; the same call goes on, here or from the archive", flush=True)
        return UNFINISHED
    finally:
        print(report.write(results, folder))
        print(archive(folder))


def run_call(call: str, machine: Machine, results: Results, clock: Clock, at_once: int) -> None:
    """What is missing of a call; raises `OutOfTime` before the time is over."""
    folder = results.path.parent
    phases = {
        "1": [speed.ceilings(machine), correct.cases(machine)],
        "2": [speed.kernels(machine, results), speed.layers(machine)],
        "3": [speed.steps(machine, results), train.resume(machine, folder)],
        "4": [train.study(machine, folder, clock, 1 if machine.rehearse else at_once)],
    }
    for cases in phases.get(call, []):
        work_off(results, cases, clock, machine.free)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what was started ends too
    sys.exit(exit_code(main))
