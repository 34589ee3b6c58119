"""A training step of the PEER layer beside that of PEER-pytorch 0.2.0, which gathers the experts' rows.

    python benchmarks/peer_step.py --experts 16384 65536 1048576 --out FILE.json

needs `pip install PEER-pytorch==0.2.0`. Both layers in the paper's mode (softmax over the retrieved experts) and fp32,
with the same weights; their outputs are compared first. Width 256, 2048 tokens, 8 heads x top 16, keys of 2 x 128 a
head. Times are medians over repeats in which the two take turns; PEER-pytorch always steps with torch's fused AdamW.

    fwd_bwd_ratio       PEER-pytorch / peerscale, forward and backward pass, gradient tables included
    dense_adamw_ratio   the same with the step of torch's fused AdamW in both
    ours_s, theirs_s    a whole step as peerscale trains, with row-sparse AdamW; PEER-pytorch as before
    ratio               theirs_s / ours_s
    *_peak_gb           highest resident memory of a process that takes three such steps, in 1e9 bytes
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peerscale.errors import UserError, exit_code
from peerscale.files import write_text

WIDTH, TOKENS, HEADS, TOP_K = 256, 2048, 8, 16
RATES = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1, "fused": True}


def main() -> None:
    """Measure each number of experts in processes of its own; this one stays small, since children inherit its peak."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--experts", type=int, nargs="+", default=[16384, 65536, 1048576], help="squares")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, help="CPU threads; torch's choice if not given")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--measure", choices=["times", "ours", "theirs"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.experts[0], options.repeats, options.threads)))
        return
    rows = []
    for experts in options.experts:
        row = {"experts": experts, **in_own_process("times", experts, options)}
        for name in ("ours", "theirs"):
            row |= in_own_process(name, experts, options)
        rows.append(row)
        print(
            f"{experts:>8} experts: {row['ours_s'] * 1e3:.0f} ms against {row['theirs_s'] * 1e3:.0f} ms, "
            f"{row['ratio']:.1f}x (forward and backward {row['fwd_bwd_ratio']:.1f}x, with dense AdamW "
            f"{row['dense_adamw_ratio']:.1f}x); "
            f"peak {row['ours_peak_gb']:.2f} GB against {row['theirs_peak_gb']:.2f} GB",
            flush=True,
        )
        write_text(options.out, json.dumps(rows, indent=1) + "\n")


def in_own_process(what: str, experts: int, options: argparse.Namespace) -> dict[str, Any]:
    """`measure` in a new process."""
    command = [sys.executable, __file__, "--measure", what, "--experts", str(experts), "--out", str(options.out)]
    command += ["--repeats", str(options.repeats), *(["--threads", str(options.threads)] if options.threads else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise UserError(f"measuring {what} with {experts} experts ended with exit code {done.returncode} (see above)")
    return json.loads(done.stdout.splitlines()[-1])


def measure(what: str, experts: int, repeats: int, threads: int | None) -> dict[str, Any]:
    """Times of both layers, or the peak memory of one."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    if what == "times":
        return times(experts, repeats)
    layer = peerscale_layer(experts) if what == "ours" else pytorch_layer(experts)
    step = training_step(layer, row_sparse(layer) if what == "ours" else dense(layer))
    for _ in range(3):
        step()
    unit = 1 if sys.platform == "darwin" else 1024
    return {f"{what}_peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}


def times(experts: int, repeats: int) -> dict[str, Any]:
    """All times and ratios. The layers exist once, the optimisers one pair after the other, so that memory suffices."""
    theirs, ours = pytorch_layer(experts), peerscale_layer(experts)
    copy_weights(theirs, ours)
    compare_outputs(theirs, ours)
    results = {}
    forward_backward = in_turns(training_step(theirs), training_step(ours), repeats)
    results["fwd_bwd_ratio"] = forward_backward[0] / forward_backward[1]
    with_dense = in_turns(training_step(theirs, dense(theirs)), training_step(ours, dense(ours)), repeats)
    results["dense_adamw_ratio"] = with_dense[0] / with_dense[1]
    whole = in_turns(training_step(theirs, dense(theirs)), training_step(ours, row_sparse(ours)), repeats)
    return results | {"ours_s": whole[1], "theirs_s": whole[0], "ratio": whole[0] / whole[1]}


def in_turns(first: Callable[[], None], second: Callable[[], None], repeats: int) -> tuple[float, float]:
    """Median seconds of either, after one unmeasured call of each."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 1):
        for function, taken in zip((first, second), seconds, strict=True):
            start = time.perf_counter()
            function()
            if repeat:
                taken.append(time.perf_counter() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def training_step(layer: Any, optimizer: Any = None) -> Callable[[], None]:
    """A step on one batch; its gradients are freed at the end, for the other layer's turn."""
    import torch

    x = torch.randn(1, TOKENS, WIDTH, requires_grad=True)
    gradient = torch.randn(1, TOKENS, WIDTH)

    def step() -> None:
        layer(x).backward(gradient)
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()
        layer.zero_grad()
        x.grad = None

    return step


def dense(layer: Any) -> Any:
    """torch's AdamW for all parameters."""
    import torch

    from peerscale.kernels.gradients import collect_row_gradients

    for table in getattr(layer, "expert_tables", list)():
        collect_row_gradients(table, False)
    return torch.optim.AdamW(layer.parameters(), **RATES)


def row_sparse(layer: Any) -> Any:
    """The optimiser that peerscale trains with."""
    from peerscale.kernels.row_sparse_adamw import RowSparseAdamW

    tables = layer.expert_tables()
    rest = [parameter for parameter in layer.parameters() if all(parameter is not table for table in tables)]
    return RowSparseAdamW([{"params": rest}, {"params": tables, "row_sparse": True}], **RATES)


def peerscale_layer(experts: int) -> Any:
    """PEER-pytorch knows no query norm, no query bias, and keys of each head only."""
    from peerscale.model.peer import Peer

    return Peer(WIDTH, experts, HEADS, TOP_K, WIDTH, n_key_sets=HEADS, query_norm=False, query_bias=False)


def pytorch_layer(experts: int) -> Any:
    """The layer to compare with."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("PEER-pytorch")
    except PackageNotFoundError:
        found = None
    if found != "0.2.0":
        raise UserError(f"this needs PEER-pytorch 0.2.0, found {found}: pip install PEER-pytorch==0.2.0")
    from PEER_pytorch import PEER  # pyrefly: ignore[missing-import]

    return PEER(WIDTH, heads=HEADS, num_experts=experts, num_experts_per_head=TOP_K, non_competing_scores=False)


def copy_weights(theirs: Any, ours: Any) -> None:
    """Their queries are laid out (half, head, width) and their keys (head, sub-key, half, width)."""
    import torch

    with torch.no_grad():
        ours.w_down.copy_(theirs.weight_down_embed.weight)
        ours.w_up.copy_(theirs.weight_up_embed.weight)
        ours.sub_keys.copy_(theirs.keys.transpose(1, 2))
        queries = theirs.to_queries[0].weight.view(2, HEADS, WIDTH // 2, WIDTH)
        ours.query.weight.copy_(queries.transpose(0, 1).reshape(-1, WIDTH))


def compare_outputs(theirs: Any, ours: Any) -> None:
    """Equal but for tokens where rounding decides between two experts of nearly equal score."""
    import torch

    x = torch.randn(1, TOKENS, WIDTH)
    with torch.no_grad():
        expected, actual = theirs(x), ours(x)
    equal = torch.isclose(actual, expected, rtol=1e-3, atol=1e-3 * expected.std().item()).all(dim=-1)
    if equal.float().mean() < 0.99:
        raise UserError(f"the layers disagree on {int((~equal).sum())} of {TOKENS} tokens: no comparison")


if __name__ == "__main__":
    sys.exit(exit_code(main))
