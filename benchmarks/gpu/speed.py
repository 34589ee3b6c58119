"""What is measured: the machine's ceilings, our kernels, a PEER layer beside PEER-pytorch's, whole training steps.

Every rate has its share of a ceiling of this machine: that of copies of at least 1 GiB (a smaller one fits the cache),
or of large matrix products. Bytes are those that an operator asks for, whether of memory or of a cache.
"""

import importlib.util
import itertools
import platform
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version

import torch
from gpu.machine import Machine
from gpu.results import Case, Results, Row
from peer_step import make_optimizer, peerscale_layer, pytorch_layer
from timing import spread
from training_step import training_step

from peerscale.config.schema import load
from peerscale.ops.pairs import Pairs, TableGradient
from peerscale.plan.cost import cost
from peerscale.plan.memory import device_memory

METHODS = ("dense", "peer", "pkm", "moe", "moe_token_choice")
RETRIEVE = ("pkm", "peer")


def ceilings(machine: Machine) -> Iterator[Case]:
    """What is installed; copies (bytes read and written); products of random numbers, since zeros draw less power."""
    found = {name: version(name) for name in ("torch", "lightning")} | {"python": platform.python_version()}
    yield Case("ceilings", "versions", {}, lambda: found)
    for n_bytes in (2**20,) if machine.rehearse else (2**30, 2**32):
        yield Case("ceilings", f"copy {n_bytes}", {"kind": "copy"}, partial(copy, machine, n_bytes))
    for kind, width in itertools.product(("bf16", "fp32", "tf32"), (64,) if machine.rehearse else (4096, 8192)):
        yield Case("ceilings", f"product {kind} {width}", {"kind": kind}, partial(product, machine, kind, width))


def copy(machine: Machine, n_bytes: int) -> Row:
    ones, target = (torch.ones(n_bytes, dtype=torch.uint8, device=machine.type) for _ in range(2))
    times = spread(machine.seconds(lambda: target.copy_(ones)))
    return {**times, "bytes_per_s": 2 * n_bytes / times["median_s"]}


def product(machine: Machine, kind: str, width: int) -> Row:
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    a, b = (torch.randn(width, width, device=machine.type).to(dtype) for _ in range(2))
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    times = spread(machine.seconds(lambda: a @ b))
    torch.set_float32_matmul_precision("highest")
    return {**times, "flops_per_s": 2 * width**3 / times["median_s"]}


def kernels(machine: Machine, results: Results) -> Iterator[Case]:
    """On uniform rows, and on rows by Zipf's law; tables in bf16, as they are read in training."""
    tables, widths, tokens, top_ks = (2**16, 2**18, 2**20), (768, 1024), 32_768, (16, 32)
    if machine.rehearse:
        tables, widths, tokens, top_ks = (64,), (24,), 16, (4,)
    for N, D, K, law in itertools.product(tables, widths, top_ks, ("uniform", "zipf")):
        for kernel in ("row_dot_products", "weighted_row_sum", "sort_pairs", "table_gradient"):
            measure = partial(rows_kernel, machine, results, kernel, (N, D, 8 * K, tokens), law)
            yield Case("kernels", f"{kernel} N{N} D{D} J{8 * K} {law}", {}, measure)
    for N, K, kind in itertools.product(tables, top_ks, ("fp32", "tf32")):
        yield Case("kernels", f"search N{N} K{K} {kind}", {}, partial(search, machine, results, N, K, tokens, kind))


def rows_kernel(machine: Machine, results: Results, kernel: str, shape: tuple[int, int, int, int], law: str) -> Row:
    (N, D, J, T), operators = shape, machine.operators
    with torch.device(machine.type):
        rows = torch.randperm(N)[(N ** torch.rand(T, J)).long() - 1 if law == "zipf" else torch.randint(N, (T, J))]
        x, table, weights = torch.randn(T, D).bfloat16(), torch.randn(N, D).bfloat16(), torch.randn(T, J)
    pairs = Pairs(operators, rows, N)
    gathered = T * J * (2 * D + 12)
    calls: dict[str, tuple[int, Callable[[], object]]] = {
        "sort_pairs": (2 * 8 * T * J, lambda: operators.sort_pairs(pairs)),
        "row_dot_products": (gathered + 2 * T * D, lambda: operators.row_dot_products(x, table, pairs)),
        "weighted_row_sum": (gathered + 2 * T * D, lambda: operators.weighted_row_sum(table, pairs, weights)),
        # Its sort is measured by itself: the first call, which does not count, sorts.
        "table_gradient": (gathered + 4 * N * D, lambda: operators.table_gradient(TableGradient(pairs, weights, x))),
    }
    n_bytes, call = calls[kernel]
    return _of(results, spread(machine.seconds(call)), bytes=n_bytes)


def search(machine: Machine, results: Results, N: int, K: int, T: int, kind: str) -> Row:
    side, heads, half = round(N**0.5), 8, 64
    with torch.device(machine.type):
        query, keys = torch.randn(T, heads, 2, half), torch.randn(1, 2, side, half)
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    with torch.no_grad():
        times = spread(machine.seconds(lambda: machine.operators.product_key_top_k(query, keys, K)))
    torch.set_float32_matmul_precision("highest")
    return _of(results, times, kind, flops=4 * T * heads * side * half)


def _of(results: Results, times: Row, kind: str = "bf16", **work: float) -> Row:
    """Times, rate, and its share of this machine's ceiling."""
    ((unit, amount),) = work.items()
    rate = amount / times["median_s"]
    ceiling = results.best(f"{unit}_per_s", phase="ceilings", kind="copy" if unit == "bytes" else kind)
    return {**times, f"{unit}_per_s": rate, "of_ceiling": rate / ceiling if ceiling else None}


# Experts, tokens, width, heads, top k; the last is OmniMoE's.
LAYERS = [(2**16, 16_384, 1024, 8, 16), (2**18, 16_384, 768, 8, 16), (2**20, 4096, 1024, 8, 16),
          (2**16, 1024, 1024, 1, 32)]  # fmt: skip


def layers(machine: Machine) -> Iterator[Case]:
    """A training step of one PEER layer in bf16 with torch's fused AdamW, ours and, where it is, PEER-pytorch's."""
    there = importlib.util.find_spec("PEER_pytorch") is not None
    for shape in [(64, 32, 24, 2, 4)] if machine.rehearse else LAYERS:
        for who in ("peerscale", *["PEER-pytorch", "PEER-pytorch compiled"] * there):
            if "compiled" not in who or shape == LAYERS[0]:
                yield Case("layers", f"{shape} {who}", {}, partial(layer_step, machine, shape, who))


def layer_step(machine: Machine, shape: tuple[int, ...], who: str) -> Row:
    experts, tokens, width, heads, top_k = shape
    with torch.device(machine.type):
        layer = (peerscale_layer if who == "peerscale" else pytorch_layer)(experts, width, heads, top_k)
        x = torch.randn(1, tokens, width, requires_grad=True)
    if who == "peerscale":
        layer.operators = machine.operators
    optimizer, forward = make_optimizer(layer, "fused_adamw"), torch.compile(layer) if "compiled" in who else layer

    def step() -> None:
        with machine.autocast():
            y = forward(x)
        y.sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return {**spread(machine.seconds(step)), "peak_bytes": machine.peak_bytes()}


def steps(machine: Machine, results: Results) -> Iterator[Case]:
    """Whole training steps in bf16; then a GPU's share of the paper's cell, token choice in place of expert choice,
    which would take statistics over all GPUs; and what the time of PEER's step goes to."""
    sizes = ["d_model=256 n_layers=8", "d_model=768 n_layers=12"]
    usual, paper = "head_dim=64 context=512 batch_sequences=32 data.vocab_size=32768", "head_dim=64 context=2048"
    paper += " batch_sequences=16 data.vocab_size=32768 d_model=768 n_layers=12"
    experts, many = ["ffn.n_experts=65536", "ffn.n_heads=4"], ["ffn.n_experts=1048576", "ffn.n_heads=8"]
    compiled = (False,) if machine.rehearse else (False, True)
    if machine.rehearse:
        sizes, usual, paper = ["d_model=16 n_layers=2"], "context=8 batch_sequences=32", "context=16 d_model=16"
        experts = many = ["ffn.n_experts=64", "ffn.n_heads=1", "ffn.top_k=4"]
    for size, compile, method in itertools.product(sizes, compiled, METHODS):
        words = [*f"ffn={method} {size} {usual} trainer.compile={compile}".split(), *experts * (method in RETRIEVE)]
        name = f"{method} {size}{' compiled' * compile}"
        yield Case("steps", name, {}, partial(step, machine, results, words, False))
    for method in ("dense", "moe_token_choice", *RETRIEVE):
        own = many if method in RETRIEVE else ["ffn.n_experts=128"] * (method != "dense")
        words = [f"ffn={method}", *paper.split(), *own]
        yield Case("steps", f"{method} paper", {}, partial(step, machine, results, words, method == "peer"))


def step(machine: Machine, results: Results, words: list[str], profiled: bool) -> Row:
    where = ["trainer.accelerator=cpu"] if machine.rehearse else ["trainer.accelerator=gpu"]
    config = load([*words, *where, f"trainer.kernel={machine.kernel}", "precision=bf16", "budget=1e15"])
    take = training_step(config, machine.type)
    times = spread(machine.seconds(take))
    found = _of(results, times, flops=cost(config).flops_per_token * config.tokens_per_step)
    found |= {"peak_bytes": machine.peak_bytes(), "planned_bytes": sum(device_memory(config).values())}
    if profiled:
        with torch.profiler.profile() as profile:
            take()
            machine.free()
        by = "self_cpu_time_total" if machine.type == "cpu" else "self_device_time_total"
        most = sorted(profile.key_averages(), key=lambda event: -getattr(event, by))[:20]
        found["most_time"] = {event.key: getattr(event, by) for event in most}
    return found
