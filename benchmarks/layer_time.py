"""How long an entrant of the standing table trains beside the reference, at equal training FLOPs.

    .venv/bin/python benchmarks/layer_time.py LAYER

Whole training steps of both in turn, at d_model 96 and as the table trains them, on a machine that does nothing else.
The times of the median steps are divided by their counted FLOPs. The ratio is kept in the entrant's folder in
results/standing, if it has one.
"""

import argparse
import statistics
import sys

import torch
from timing import in_turns
from training_step import training_step

from peerscale.errors import UserError, exit_code
from peerscale.files import write_json
from peerscale.plan.entrant import TUNING_BUDGET, Placing, read_entrant, reference_name
from peerscale.records.entry import ENTRY, STANDING, TIME
from peerscale.records.machine import cpu_name, git_commit
from peerscale.records.study import read_json
from peerscale.train.environment import mkl_kernels
from peerscale.train.memory import keep_freed_memory

WIDTH, REPEATS = 96, 200


def main() -> None:
    """Measure, print the ratio, keep it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("layer", help="an entrant of sweeps/standing, or a layer of conf/ffn")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    options = parser.parse_args()
    reference = reference_name()
    if reference is None:
        raise UserError(
            "no file in sweeps/standing says `reference: true`; add that line to one of them, such as "
            "sweeps/standing/dense.yaml, to time the layer with it"
        )
    keep_freed_memory()
    torch.set_num_threads(1)
    steps, flops = {}, {}
    for name in (options.layer, reference):
        entry = STANDING / name / ENTRY
        chosen = [*read_json(entry)["chosen"].values()][-1] if entry.is_file() else {}
        (cell,) = Placing(name, read_entrant(name)).cells([chosen], TUNING_BUDGET, [WIDTH], [0])
        steps[name] = training_step(cell.config)
        flops[name] = cell.plan.cost.flops_per_token * cell.config.tokens_per_step
    times = {name: statistics.median(each) for name, each in in_turns(steps, options.repeats).items()}
    per_flop = {name: times[name] / flops[name] for name in steps}
    ratio = per_flop[options.layer] / per_flop[reference]
    print(f"{options.layer}: {ratio:.2f} x the time of {reference} at equal training FLOPs")
    if (STANDING / options.layer).is_dir():
        write_json(STANDING / options.layer / TIME, {
            "time_over_reference": round(ratio, 3), "reference": reference, "d_model": WIDTH, "steps": options.repeats,
            "ms_per_step": {name: round(1e3 * seconds, 2) for name, seconds in times.items()},
            "torch": torch.__version__, "cpu": cpu_name(), "mkl": mkl_kernels(), "threads": 1,
            "git_commit": git_commit(),
        })  # fmt: skip


if __name__ == "__main__":
    sys.exit(exit_code(main))
