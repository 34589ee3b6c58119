"""A whole training step of each method, and the share of the machine's matrix-product rate that it reaches.

    .venv/bin/python benchmarks/training_step.py --out FILE.csv

The steps are those of a study (default configuration: 16 x 64 tokens, fp32) without Lightning: loss, gradients,
clipping, optimiser. `flops_rate_of_gemm` is their counted FLOPs per second, divided by those of a 1024 x 1024 matrix
product that is timed between the steps. `time_over_dense` is time per FLOP divided by the dense model's, which is the
ratio of training times at a matched budget.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from timing import in_turns, matrix_product, spread, write_table

from peerscale.config.schema import Config, load
from peerscale.errors import exit_code
from peerscale.plan.cost import cost
from peerscale.plan.plan import plan
from peerscale.train.memory import keep_freed_memory
from peerscale.train.module import LanguageModel

METHODS = ["dense", "moe", "moe_token_choice", "pkm", "peer"]


def main() -> None:
    """Measure each size, print a row for each method, write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--widths", nargs="+", default=["16", "32", "64", "128"], help="d_model")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="dense first")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "1")))
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--overrides", nargs="*", default=[], help="such as precision=bf16")
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, object]] = []
    for width in options.widths:
        steps, flops, tokens = {}, {}, {}
        for method in options.methods:
            config = load(["budget=1e13", f"ffn={method}", f"d_model={width}", *options.overrides])
            steps[method], tokens[method] = training_step(config), config.tokens_per_step
            flops[method] = cost(config).flops_per_token * config.tokens_per_step
        steps["gemm"], flops["gemm"] = matrix_product()
        seconds = in_turns(steps, options.repeats)
        rate = {name: flops[name] / statistics.median(values) for name, values in seconds.items()}
        for method in options.methods:
            row = {"size": f"d{width}", "method": method, "threads": options.threads}
            row |= {"tokens": tokens[method], "flops": flops[method]}
            row |= spread(seconds[method])
            row["gemm_flops_per_s"], row["flops_rate_of_gemm"] = rate["gemm"], rate[method] / rate["gemm"]
            row["time_over_dense"] = rate[options.methods[0]] / rate[method]
            rows.append(row)
            print(
                f"{width:>5} {method:<17} {1e3 * row['median_s']:6.1f} ms, {rate[method] / 1e9:5.1f} GFLOP/s, "
                f"{row['flops_rate_of_gemm']:.2f} of the product's rate, {row['time_over_dense']:.2f} x dense",
                flush=True,
            )
    write_table(options.out, rows)


def training_step(config: Config, device: str = "cpu") -> Callable[[], object]:
    """Loss, gradients, clip and optimiser, on random tokens."""
    module = LanguageModel(config, plan(config), device).to(device)
    if config.trainer.compiles_on(device):
        module.model.compile_backbone()
    optimizer = module.configure_optimizers()["optimizer"]  # pyrefly: ignore
    shape = (config.batch_sequences, config.context + 1)
    tokens = torch.randint(config.data.vocab_size, shape, device=device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, config.precision == "bf16"):
            loss = module.training_step(tokens, 0)["loss"]
        loss.backward()
        module.configure_gradient_clipping(optimizer)
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    sys.exit(exit_code(main))
