"""Whether every operator of the backend, and a model of each method, computes what the `reference` does in float64.

An error is the largest distance from the reference over the reference's largest value, and is judged as a multiple of
what is allowed: above 1 is wrong.
"""

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from gpu.machine import Machine
from gpu.results import Case, Results, Row
from gpu.speed import METHODS
from torch import Tensor

from peerscale.config.schema import load
from peerscale.files import PACKAGE
from peerscale.ops.backends import BACKENDS
from peerscale.ops.operators import Operators
from peerscale.plan.plan import plan
from peerscale.train.module import LanguageModel

REFERENCE = BACKENDS["reference"]
ALLOWED = {torch.float32: 2e-5, torch.bfloat16: 2 * 2**-7}
"""A few roundings of a sum; two of a result."""
LOSS, GRADIENT = 1e-5, 2e-2
"""Of a model. Where two experts are nearly equal, rounding decides on a token, which shows in gradients; a wrong
operator shows far more."""

# T tokens that retrieve J rows each, of a table of N rows of D numbers: the paper's table; every configuration; an
# empty batch; two thousand pairs a row; one token.
FULL = [
    (1031, 768, 2**20, 128),
    *((37, D, N, J) for D, N, J in itertools.product((24, 128, 1024), (256, 65536), (1, 128))),
    *((0, 40, 256, 64), (4099, 256, 256, 128), (1, 24, 65536, 1)),
]
TINY = [(5, 24, 256, 4), (0, 8, 16, 2)]

Errors = dict[str, float]
"""What was compared, and its error over what is allowed."""


def cases(machine: Machine) -> Iterator[Case]:
    """The operators at every shape, then the methods' models. Rows of other sources than these do not count."""
    sources = stamp()
    for shape, dtype in itertools.product(TINY if machine.rehearse else FULL, ALLOWED):
        name = f"{'T{} D{} N{} J{}'.format(*shape)} {str(dtype)[6:]} of {sources}"
        yield Case("correct", name, {"sources": sources}, partial(judged, operators, machine, shape, dtype))
    for method in METHODS:
        name = f"model {method} of {sources}"
        yield Case("correct", name, {"sources": sources}, partial(judged, model, machine, method))


def stamp() -> str:
    """Of all that the verdict is about."""
    files = sorted(path for part in ("ops", "layers", "model") for path in PACKAGE.glob(f"{part}/*.*"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:8]


def verdict(results: Results) -> tuple[bool, str]:
    """Whether the backend may be trusted, and why, in one line."""
    sources = stamp()
    rows = [row for row in results.rows.values() if row.get("sources") == sources]
    wrong = [row["case"] for row in rows if not isinstance(row.get("of_allowed"), float) or not row["of_allowed"] <= 1]
    expected = len(ALLOWED) * len(TINY if "rehearsal" in results.device else FULL) + len(METHODS)
    if wrong:
        return False, f"WRONG: {len(wrong)} of {len(rows)} cases, such as {wrong[0]}"
    right = len(rows) == expected
    return right, f"{'RIGHT' if right else 'NOT KNOWN'}: {len(rows)} of {expected} cases were right"


def judged(function: Callable[..., Errors], *arguments: Any) -> Row:
    """The worst of some checks."""
    torch.manual_seed(0)
    found = function(*arguments)
    worst = max(found, key=lambda what: math.inf if math.isnan(found[what]) else found[what])
    return {"checks": len(found), "worst": worst, "of_allowed": found[worst]}


def operators(machine: Machine, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Errors:
    """All that concerns tables, logits, and in fp32 product keys. Rows are random, the first twice in each token."""
    (T, D, N, J), backend = shape, machine.operators
    with torch.device(machine.type):
        rows = torch.randint(N, (T, J))
        rows[:, -1] = rows[:, 0]
        # Rounded already, so that the definition needs no rounding.
        x, down, up = (torch.randn(n, D).to(dtype) / D**0.25 for n in (T, N, N))
        down, up, gates, targets = down.float(), up.float(), torch.rand(T, J) - 0.2, torch.randint(512, (T,))
        found = compared(
            lambda o, x, down, up, gates: o.single_neuron_experts(x, down, up, rows, gates, "gelu"),
            "experts", backend, [x, down, up, gates], ALLOWED[dtype],
        )  # fmt: skip
        found |= compared(
            lambda o, table, gates: o.weighted_rows(table, rows, gates, dtype if o is backend else None),
            "weighted rows", backend, [up, gates], ALLOWED[dtype],
        )  # fmt: skip
        logits = torch.randn(T, 512).to(dtype)
        exact = logits.double()
        losses = [o.cross_entropy_(z, targets, 0.5) for o, z in ((backend, logits), (REFERENCE, exact))]
        found["cross-entropy"] = error(losses[0], losses[1], ALLOWED[torch.float32])
        found["its gradient"] = error(logits, exact, ALLOWED[dtype])
        if T and dtype == torch.float32:
            top_k, side = min(16, J), round(N**0.5)
            query, keys = torch.randn(T, J // top_k, 2, D // 2), torch.randn(1, 2, side, D // 2) / D**0.5
            scores, best = (o.product_key_top_k(query.to(d), keys.to(d), top_k) for o, d in (
                (backend, torch.float32), (REFERENCE, torch.float64)))  # fmt: skip
            found["search"] = error(scores[0], best[0], ALLOWED[dtype])
            found["distinct rows"] = 0.0 if scores[1].sort(-1).values.diff(dim=-1).ne(0).all() else math.inf
    return found


def compared(
    function: Callable[..., Tensor], name: str, backend: Operators, tensors: Sequence[Tensor], allowed: float
) -> Errors:
    """Errors of the result and of the gradients of all tensors, for a probe that is the same for both."""
    both = []
    for operators, taken in ((backend, tensors), (REFERENCE, [tensor.double() for tensor in tensors])):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in taken]
        y = function(operators, *leaves)
        probe = torch.sin(torch.arange(y.numel(), dtype=torch.float64)).view_as(y).to(y.dtype)
        both.append([y.detach(), *torch.autograd.grad((y * probe).sum(), leaves)])
    names = [name, *(f"{name}, gradient {i}" for i in range(len(tensors)))]
    return {what: error(*pair, allowed) for what, pair in zip(names, zip(*both, strict=True), strict=True)}


def error(actual: Tensor, expected: Tensor, allowed: float) -> float:
    """See the module's docstring; infinite for another shape, or a value that is not finite."""
    if actual.shape != expected.shape or not actual.isfinite().all():
        return math.inf
    if expected.numel() == 0:
        return 0.0
    scale = max(expected.abs().max().item(), 1e-30)
    return (actual.double() - expected).abs().max().item() / scale / allowed


def model(machine: Machine, method: str) -> Errors:
    """The loss and every gradient of a small model in fp32, and its loss compiled in bf16."""
    size = ["d_model=16", "context=8"] if machine.rehearse else ["d_model=128", "head_dim=64", "context=64"]
    words = [f"ffn={method}", *size, "n_layers=2", "batch_sequences=32", "data.vocab_size=512", "budget=1e12"]
    words += ["ffn.n_experts=4096"] * (method in ("pkm", "peer"))
    modules = []
    for kernel in ("reference", machine.kernel):
        config = load([*words, f"trainer.kernel={kernel}"])
        modules.append(LanguageModel(config, plan(config), machine.type).to(machine.type))
    reference, ours = modules
    ours.load_state_dict(reference.state_dict())
    tokens = torch.randint(512, (32, reference.config.context + 1), device=machine.type)
    losses = []
    for module in (ours, reference.double()):
        losses.append(module.training_step(tokens, 0)["loss"])
        losses[-1].backward()
    expected, found = losses[1].item(), {"loss": abs(losses[0].item() / losses[1].item() - 1) / LOSS}
    for (name, one), other in zip(ours.named_parameters(), reference.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None, name
        norm = max(other.grad.norm().item(), 1e-6)  # a bias before BatchNorm has none but rounding
        found[f"gradient of {name}"] = (one.grad.double() - other.grad).norm().item() / norm / GRADIENT
    if not machine.rehearse:
        ours.model.compile_backbone()
    with machine.autocast():
        found["loss in bf16"] = abs(ours.training_step(tokens, 0)["loss"].item() / expected - 1) / (1000 * LOSS)
    return found
