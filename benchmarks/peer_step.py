"""A training step of the PEER layer beside one of PEER-pytorch, which gathers the experts' rows.

    .venv/bin/python -m pip install --editable '.[bench]'
    .venv/bin/python benchmarks/peer_step.py --experts 16384 65536 1048576 --out FILE.json

Both layers run in the paper's mode (softmax over the retrieved experts), in fp32 and with the same weights; first their
outputs are compared. Width 256, 2048 tokens, 8 heads x top 16, keys of 2 x 128 for each head. Each layer has a process
of its own, as in training. The two take turns, and times are medians over the turns. peerscale's process keeps freed
memory, as its trainer does; PEER-pytorch's has torch's default allocator.

    fwd_bwd_ratio       PEER-pytorch / peerscale, forward and backward pass, gradient tables included
    dense_adamw_ratio   the same with a step of torch's fused AdamW in both
    ours_s, theirs_s    a whole step, with row-sparse AdamW here and torch's usual AdamW there
    ratio               theirs_s / ours_s
    ratio_fused_adamw   the same with torch's fused AdamW in PEER-pytorch
    ratio_tuned         the same with fused AdamW and a process that keeps freed memory
    *_peak_gb           highest resident memory of a process that takes three such steps, in 1e9 bytes

FILE.csv, beside FILE.json, has a row for each implementation and step: seconds (median, least, most), memory, ratio.
"""

import argparse
import contextlib
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from timing import spread, write_table

from peerscale.errors import UserError, exit_code
from peerscale.files import write_text

WIDTH, TOKENS, HEADS, TOP_K = 256, 2048, 8, 16
RATES = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}


def main() -> None:
    """Measure each number of experts. This process stays small, because children inherit its peak memory."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--experts", type=int, nargs="+", default=[16384, 65536, 1048576], help="squares")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, help="CPU threads; torch's choice if not given")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--work", nargs=2, metavar=("LAYER", "STEP"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        layer, step = options.work
        work(layer, step, options.experts[0], options.threads)
        return
    summaries, table = [], []
    for experts in options.experts:
        summary, rows = measure(experts, options)
        summaries.append(summary)
        table += rows
        print(
            f"{experts:>8} experts: {summary['ours_s'] * 1e3:.0f} ms against {summary['theirs_s'] * 1e3:.0f} ms, "
            f"{summary['ratio']:.1f}x ({summary['ratio_fused_adamw']:.1f}x if theirs has fused AdamW, "
            f"{summary['ratio_tuned']:.1f}x if it also keeps freed memory; forward and backward "
            f"{summary['fwd_bwd_ratio']:.1f}x, with dense AdamW {summary['dense_adamw_ratio']:.1f}x); "
            f"peak {summary['ours_peak_gb']:.2f} GB against {summary['theirs_peak_gb']:.2f} GB",
            flush=True,
        )
        write_text(options.out, json.dumps(summaries, indent=1) + "\n")
        write_table(options.out.with_suffix(".csv"), table)


def measure(experts: int, options: argparse.Namespace) -> tuple[dict[str, float], list[dict[str, object]]]:
    """The ratios for one number of experts, and the rows of the table behind them."""
    theirs, ours = in_turns("gradients", "gradients", experts, options)
    theirs_fused, ours_dense = in_turns("fused_adamw", "fused_adamw", experts, options)
    theirs_whole, ours_whole = in_turns("adamw", "row_sparse_adamw", experts, options)
    theirs_tuned, ours_again = in_turns("fused_adamw", "row_sparse_adamw", experts, options, theirs="theirs_tuned")
    peaks = {}
    for layer, step in (("ours_afresh", "row_sparse_adamw"), ("theirs", "adamw")):
        with worker(layer, step, experts, options) as process:
            peaks[layer] = max(process()["peak_gb"] for _ in range(3))
    rows: list[dict[str, object]] = []
    for optimiser, first, second in (
        ("none", theirs, ours),
        ("dense AdamW, fused", theirs_fused, ours_dense),
        ("AdamW; row-sparse AdamW", theirs_whole, ours_whole),
    ):
        for implementation, seconds in ((f"PEER-pytorch {version('PEER-pytorch')}", first), ("peerscale", second)):
            row = {"experts": experts, "tokens": TOKENS, "d_model": WIDTH, "implementation": implementation}
            row |= {"optimiser": optimiser, **spread(seconds)}
            row["ratio"] = statistics.median(first) / statistics.median(seconds)
            rows.append(row)
    medians = [statistics.median(s) for s in (theirs, ours, theirs_fused, ours_dense, theirs_whole, ours_whole)]
    summary = {
        "experts": experts,
        "fwd_bwd_ratio": medians[0] / medians[1],
        "dense_adamw_ratio": medians[2] / medians[3],
        "ours_s": medians[5],
        "theirs_s": medians[4],
        "ratio": medians[4] / medians[5],
        "ratio_fused_adamw": medians[2] / medians[5],
        "ratio_tuned": statistics.median(theirs_tuned) / statistics.median(ours_again),
        "ours_peak_gb": peaks["ours_afresh"],
        "theirs_peak_gb": peaks["theirs"],
    }
    rows[-2]["peak_gb"], rows[-1]["peak_gb"] = peaks["theirs"], peaks["ours_afresh"]
    return summary, [{**row, "peak_gb": row.get("peak_gb", "")} for row in rows]


def in_turns(
    their_step: str, our_step: str, experts: int, options: argparse.Namespace, theirs: str = "theirs"
) -> tuple[list[float], list[float]]:
    """Seconds of the steps of either, after one unmeasured step each."""
    with (
        worker(theirs, their_step, experts, options) as their_turn,
        worker("ours", our_step, experts, options) as our_turn,
    ):
        turns = [(their_turn()["seconds"], our_turn()["seconds"]) for _ in range(options.repeats + 1)][1:]
    first, second = zip(*turns, strict=True)
    return list(first), list(second)


@contextlib.contextmanager
def worker(layer: str, step: str, experts: int, options: argparse.Namespace) -> Iterator[Callable[[], dict[str, Any]]]:
    """A process that works off one step for each call of the function yielded."""
    command = [sys.executable, __file__, "--work", layer, step, "--experts", str(experts), "--out", str(options.out)]
    command += ["--threads", str(options.threads)] if options.threads else []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        stdin, stdout = process.stdin, process.stdout
        assert stdin and stdout

        def turn(stdin: IO[str] = stdin, stdout: IO[str] = stdout) -> dict[str, Any]:
            with contextlib.suppress(BrokenPipeError):
                print("step", file=stdin, flush=True)
            if not (answer := stdout.readline()):
                raise UserError(
                    f"the process that measures {layer} ({step}, {experts} experts) ended; its message is above"
                )
            return json.loads(answer)

        yield turn


def work(layer_name: str, step_name: str, experts: int, threads: int | None) -> None:
    """For each line of the input a step, and a line with its seconds and the peak of memory so far."""
    import torch

    from peerscale.train.memory import keep_freed_memory

    if layer_name != "theirs":
        keep_freed_memory()
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    layer = {
        "theirs": pytorch_layer,
        "theirs_tuned": pytorch_layer,
        "ours": with_their_weights,
        "ours_afresh": peerscale_layer,
    }[layer_name](experts)
    optimizer = make_optimizer(layer, step_name)
    x, gradient = torch.randn(1, TOKENS, WIDTH, requires_grad=True), torch.randn(1, TOKENS, WIDTH)
    for _ in sys.stdin:
        start = time.perf_counter()
        layer(x).backward(gradient)
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()
        layer.zero_grad()  # and frees the memory for the other layer's turn
        x.grad = None
        seconds = time.perf_counter() - start
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
        print(json.dumps({"seconds": seconds, "peak_gb": peak}), flush=True)


def make_optimizer(layer: Any, step_name: str) -> Any:
    """torch's AdamW by default or fused, the row-sparse one, or none for gradients alone."""
    import torch

    from peerscale.ops.row_sparse_adamw import RowSparseAdamW

    match step_name:
        case "gradients":
            return None
        case "adamw":
            return torch.optim.AdamW(layer.parameters(), **RATES)
        case "fused_adamw":
            return torch.optim.AdamW(layer.parameters(), **RATES, fused=True)
        case _:
            tables = layer.expert_tables()
            rest = [parameter for parameter in layer.parameters() if all(parameter is not table for table in tables)]
            return RowSparseAdamW([{"params": rest}, {"params": tables, "row_sparse": True}], **RATES, fused=True)


def peerscale_layer(experts: int, width: int = WIDTH, heads: int = HEADS, top_k: int = TOP_K) -> Any:
    """PEER-pytorch knows no query norm, no query bias, and keys of each head only."""
    from peerscale.layers import Peer

    return Peer(width, experts, heads, top_k, width, shared_keys=False, query_norm=False, query_bias=False)


def with_their_weights(experts: int) -> Any:
    """`peerscale_layer` with the weights of `pytorch_layer`, once their outputs were found equal."""
    theirs, ours = pytorch_layer(experts), peerscale_layer(experts)
    copy_weights(theirs, ours)
    compare_outputs(theirs, ours)
    return ours


def pytorch_layer(experts: int, width: int = WIDTH, heads: int = HEADS, top_k: int = TOP_K) -> Any:
    """The layer to compare with."""
    try:
        from PEER_pytorch import PEER  # pyrefly: ignore[missing-import]
    except ImportError:
        raise UserError(
            "PEER-pytorch is not installed: .venv/bin/python -m pip install --editable '.[bench]'"
        ) from None
    return PEER(width, heads=heads, num_experts=experts, num_experts_per_head=top_k, non_competing_scores=False)


def copy_weights(theirs: Any, ours: Any) -> None:
    """Their queries are laid out (half, head, width) and their keys (head, sub-key, half, width)."""
    import torch

    with torch.no_grad():
        ours.w_down.copy_(theirs.weight_down_embed.weight)
        ours.w_up.copy_(theirs.weight_up_embed.weight)
        ours.sub_keys.copy_(theirs.keys.transpose(1, 2))
        width = ours.w_down.shape[1]
        queries = theirs.to_queries[0].weight.view(2, ours.n_heads, -1, width)
        ours.query.weight.copy_(queries.transpose(0, 1).reshape(-1, width))


def compare_outputs(theirs: Any, ours: Any) -> None:
    """Equal but for tokens where rounding decides between two experts of nearly equal score."""
    import torch

    x = torch.randn(1, TOKENS, ours.w_down.shape[1], device=ours.w_down.device)
    with torch.no_grad():
        expected, actual = theirs(x), ours(x)
    equal = torch.isclose(actual, expected, rtol=1e-3, atol=1e-3 * expected.std().item()).all(dim=-1)
    if equal.float().mean() < 0.99:
        raise UserError(f"the layers disagree on {int((~equal).sum())} of {TOKENS} tokens: no comparison")


if __name__ == "__main__":
    sys.exit(exit_code(main))
