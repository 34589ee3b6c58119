"""A training step of one PEER layer, beside PEER-pytorch's: forward, backward, optimiser; and the most memory it took.

Ours takes torch's fused AdamW. Theirs runs as it comes, with fused AdamW, and compiled with fused AdamW. Each is alone
in the device's memory. Outputs of the two with the same weights are compared once.
"""

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from gpu.machine import Machine
from gpu.results import Case, Row
from peer_step import compare_outputs, copy_weights, make_optimizer, peerscale_layer, pytorch_layer
from timing import spread


class Shape(NamedTuple):
    """One layer and its batch."""

    experts: int
    tokens: int
    width: int
    heads: int
    top_k: int
    precision: str

    def __str__(self) -> str:
        return f"N{self.experts} T{self.tokens} D{self.width} {self.heads}x{self.top_k} {self.precision}"


# Small tables first, so that something of everything is there when a call is broken off.
FULL = [
    *(Shape(n, 1024, 1024, 1, 32, "bf16") for n in (2**10, 2**12, 2**14, 2**16)),
    *(
        Shape(experts, tokens, width, 8, 16, "fp32")
        for experts in (2**14, 2**16, 2**20)
        for width in (256, 1024)
        for tokens in (4096, 16384)
    ),
]
TINY = [Shape(64, 32, 24, 2, 4, "fp32"), Shape(64, 16, 16, 1, 8, "bf16")]

OURS = {"peerscale": "fused_adamw"}
THEIRS = {
    "PEER-pytorch": "adamw",
    "PEER-pytorch, fused AdamW": "fused_adamw",
    "PEER-pytorch, compiled, fused AdamW": "fused_adamw",
}


def cases(machine: Machine) -> Iterator[Case]:
    """Every implementation at every shape."""
    shapes = TINY if machine.rehearse else FULL
    yield Case("same outputs", {}, partial(outputs, machine, shapes[0]))
    for shape in shapes:
        for name, optimiser in {**OURS, **THEIRS}.items():
            labels = {**shape._asdict(), "implementation": name, "optimiser": optimiser}
            yield Case(f"{shape} {name}", labels, partial(step, machine, shape, name, optimiser))


def outputs(machine: Machine, shape: Shape) -> Row:
    """Whether the two layers with the same weights give the same."""
    if missing := _missing():
        return missing
    ours, theirs = _layer(machine, shape, "peerscale"), _layer(machine, shape, "PEER-pytorch")
    copy_weights(theirs, ours)
    compare_outputs(theirs, ours)
    return {"same": True}


def step(machine: Machine, shape: Shape, name: str, optimiser: str) -> Row:
    """Seconds, and the most bytes that tensors took, weights and moments among them."""
    if name in THEIRS and (missing := _missing()):
        return missing
    if "compiled" in name and machine.rehearse:
        return {"reason": "left out of the rehearsal: compiling takes long"}
    if "compiled" in name:
        torch.compiler.reset()  # or the eighth shape would not be compiled any more
    torch.manual_seed(0)
    layer = _layer(machine, shape, name)
    taken = training_step(machine, shape, layer, make_optimizer(layer, optimiser), "compiled" in name)
    times = spread(machine.seconds(taken))
    return {**times, "tokens_per_s": shape.tokens / times["median_s"], "peak_bytes": machine.peak_bytes()}


def training_step(machine: Machine, shape: Shape, layer: Any, optimizer: Any, compiled: bool) -> Callable[[], None]:
    """A step on random tokens; its optimiser's step is not compiled."""
    forward = torch.compile(layer) if compiled else layer
    x = torch.randn(1, shape.tokens, shape.width, device=machine.type, requires_grad=True)
    gradient = torch.randn_like(x)

    def take() -> None:
        with machine.autocast(shape.precision):
            y = forward(x)
        y.backward(gradient.to(y.dtype))
        optimizer.step()
        optimizer.zero_grad()
        x.grad = None

    return take


def _layer(machine: Machine, shape: Shape, name: str) -> Any:
    build = pytorch_layer if name in THEIRS else peerscale_layer
    with torch.device(machine.type):  # a table of a million rows is drawn on the device
        layer = build(shape.experts, shape.width, shape.heads, shape.top_k)
    if name in OURS:
        layer.operators = machine.operators
    return layer


def _missing() -> Row:
    """Why PEER-pytorch cannot be measured, as a row; empty if it can."""
    return {} if importlib.util.find_spec("PEER_pytorch") else {"reason": "PEER-pytorch is not installed"}
