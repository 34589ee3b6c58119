"""What the machine can do at best: the rates of copies and of matrix products; and what is installed on it."""

import importlib.util
import platform
from collections.abc import Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from gpu.machine import Machine
from gpu.results import Case, Row, read_rows
from timing import spread

PACKAGES = ("torch", "triton", "lightning", "numpy", "hydra-core", "pydantic", "PEER-pytorch", "einx")
COPIED_BYTES = (2**26, 2**28, 2**30, 2**32)
WIDTHS = (1024, 2048, 4096, 8192)
KINDS = ("bf16", "fp32", "fp32, TF32")


def cases(machine: Machine) -> Iterator[Case]:
    """Versions, copies, products."""
    yield Case("versions", {}, partial(versions, machine))
    for n_bytes in (2**20,) if machine.rehearse else COPIED_BYTES:
        yield Case(f"copy {n_bytes / 2**20:.0f} MiB", {"bytes": n_bytes}, partial(copy, machine, n_bytes))
    for kind in KINDS:
        for width in (64,) if machine.rehearse else WIDTHS:
            yield Case(
                f"product {width} {kind}", {"kind": kind, "width": width}, partial(product, machine, width, kind)
            )


def versions(machine: Machine) -> Row:
    """The device, and the packages; null is one that is not there."""
    found: Row = {"device": machine.name, "python": platform.python_version(), "cuda": torch.version.cuda}
    if machine.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"multiprocessors": properties.multi_processor_count, "memory_bytes": properties.total_memory}
        found |= {"capability": f"{properties.major}.{properties.minor}", "l2_bytes": properties.L2_cache_size}
    return found | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version" if importlib.util.find_spec(package.replace("-", "_")) else None


def copy(machine: Machine, n_bytes: int) -> Row:
    """From the device's memory to itself; bytes read and written count."""
    source = torch.ones(n_bytes, dtype=torch.uint8, device=machine.type)
    target = torch.empty_like(source)
    times = spread(machine.seconds(lambda: target.copy_(source)))
    return {**times, "bytes_per_s": 2 * n_bytes / times["median_s"]}


def product(machine: Machine, width: int, kind: str) -> Row:
    """Of two square matrices of random numbers (zeros draw less power, and run faster)."""
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    a, b = (torch.randn(width, width, device=machine.type).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = kind.endswith("TF32")
    try:
        times = spread(machine.seconds(lambda: torch.mm(a, b, out=out)))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return {**times, "flops_per_s": 2 * width**3 / times["median_s"]}


def copy_rate(folder: Path) -> float | None:
    """Bytes per second, read and written, of the fastest copy; None where none was measured."""
    return max((row["bytes_per_s"] for row in read_rows(folder, "ceilings") if "bytes_per_s" in row), default=None)


def product_rate(folder: Path, kind: str) -> float | None:
    """FLOPs per second of the fastest product of a kind; None where none was measured."""
    rows = [row for row in read_rows(folder, "ceilings") if row.get("kind") == kind and "flops_per_s" in row]
    return max((row["flops_per_s"] for row in rows), default=None)


def share(value: float, of: float | None) -> float | None:
    """Null where the ceiling was not measured."""
    return value / of if of else None
