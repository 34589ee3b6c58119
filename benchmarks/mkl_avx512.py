"""Whole training steps with MKL as it is, and with AVX-512 on processors of AMD (`make sweep AVX512=1`).

    .venv/bin/python benchmarks/mkl_avx512.py --library .venv/mkl_avx512.so --out FILE.csv

MKL decides when it is loaded, so each side is a process of its own; they step in turns.
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

from timing import in_turns, spread, write_table

from peerscale.errors import exit_code

METHODS = ["dense", "moe_token_choice", "pkm", "peer"]


def main() -> None:
    """Measure each size and method, print the ratios, write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--widths", nargs="+", default=["32", "64", "112"], help="d_model")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--library", type=Path, required=True, help="the compiled ops/mkl_avx512.c")
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    for width in options.widths:
        for method in options.methods:
            told = {"LD_PRELOAD": str(options.library.resolve())}
            sides = {"as it is": Stepper(method, width, {}), "avx512": Stepper(method, width, told)}
            seconds = in_turns({name: side.step for name, side in sides.items()}, options.repeats)
            for side in sides.values():
                side.end()
            medians = {name: statistics.median(values) for name, values in seconds.items()}
            rows += [{"size": f"d{width}", "method": method, "mkl": name, **spread(seconds[name])} for name in sides]
            before, after = (medians[name] for name in sides)
            print(f"{width:>5} {method:<17} {1e3 * before:6.1f} ms, x {after / before:.2f} with AVX-512", flush=True)
    write_table(options.out, rows)


class Stepper:
    """A process that takes a training step for each line that it reads."""

    def __init__(self, method: str, width: str, environment: dict[str, str]) -> None:
        program = [sys.executable, __file__, method, width]
        self.process = subprocess.Popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
        )

    def step(self) -> None:
        """Take one step."""
        assert self.process.stdin and self.process.stdout
        print(file=self.process.stdin, flush=True)
        if not self.process.stdout.readline():
            raise RuntimeError("the process that takes the steps has ended")

    def end(self) -> None:
        """End the process."""
        self.process.communicate()


def take_steps(method: str, width: str) -> None:
    """The other side of `Stepper`."""
    import torch
    from training_step import training_step

    from peerscale.config.schema import load
    from peerscale.train.memory import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(1)
    step = training_step(load(["budget=1e13", "batch_sequences=32", f"ffn={method}", f"d_model={width}"]))
    for _ in sys.stdin:
        step()
        print(flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 3 and not sys.argv[1].startswith("-"):
        take_steps(*sys.argv[1:])
    else:
        sys.exit(exit_code(main))
