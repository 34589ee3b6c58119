"""How the time of a PEER layer's step grows with the number of experts, of active experts and of tokens.

    .venv/bin/python benchmarks/growth.py --out FILE.csv

Width 256, fp32, row-sparse AdamW. One of the three numbers varies; the others stay at 65,536 experts, 128 active ones
(8 heads x top 16) and 2,048 tokens. `limit_s` is the time to move the rows that are touched: each is read forward and
backward, and the optimiser reads and writes it with its two moments. It is computed with the rate at which random rows
are read, measured in the same run. A step can be faster where a table stays in the cache.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from peer_step import make_optimizer
from timing import in_turns, random_row_bytes_per_s, spread, write_table

from peerscale.errors import exit_code
from peerscale.layers import Peer
from peerscale.train.memory import keep_freed_memory

WIDTH = 256
EXPERTS, ACTIVE, TOKENS = 2**16, 128, 2048
SERIES: dict[str, list[int]] = {
    "experts": [2**12, 2**14, 2**16, 2**18, 2**20],
    "active_experts": [32, 64, 128, 256, 512],
    "tokens": [512, 1024, 2048, 4096, 8192],
}
ROWS_MOVED = 2 * (2 + 6)  # of the two tables: read twice, then three arrays read and written


def main() -> None:
    """Measure each point, print it, write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "1")))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    bandwidth = random_row_bytes_per_s(WIDTH)
    print(f"random rows of {4 * WIDTH} bytes are read at {bandwidth / 1e9:.1f} GB/s")
    rows: list[dict[str, object]] = []
    for varied, values in SERIES.items():
        for value in values:
            point = {"experts": EXPERTS, "active_experts": ACTIVE, "tokens": TOKENS, varied: value}
            step, touched = layer_step(**point)
            row = {"varied": varied, **point, "threads": options.threads}
            row |= spread(in_turns({"step": step}, options.repeats)["step"])
            row["rows_touched"], row["random_row_bytes_per_s"] = touched, bandwidth
            row["limit_s"] = touched * ROWS_MOVED * 4 * WIDTH / bandwidth
            rows.append(row)
            print(
                f"{varied} {value:>9,}: {1e3 * row['median_s']:7.1f} ms; to move the {touched:,} rows touched "
                f"{1e3 * row['limit_s']:.1f} ms",
                flush=True,
            )
    write_table(options.out, rows)


def layer_step(experts: int, active_experts: int, tokens: int) -> tuple[Callable[[], None], int]:
    """Forward, backward and optimiser on random inputs, and how many experts they touch."""
    torch.manual_seed(0)
    heads = 8
    layer = Peer(WIDTH, experts, heads, active_experts // heads, WIDTH)
    optimizer = make_optimizer(layer, "row_sparse_adamw")
    x, gradient = torch.randn(tokens, WIDTH, requires_grad=True), torch.randn(tokens, WIDTH)
    touched = len(layer.retrieve(x)[1].unique())

    def step() -> None:
        layer(x).backward(gradient)
        optimizer.step()
        optimizer.zero_grad()
        x.grad = None

    return step, touched


if __name__ == "__main__":
    sys.exit(exit_code(main))
