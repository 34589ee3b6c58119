"""Whether every operator of the backend computes what the definition says: the `reference` in float64, on one device.

An error is the largest distance from the reference over the reference's largest value, and is judged as a multiple of
what is allowed: above 1 is wrong. Rows of tables are drawn at random, some twice in a token.
"""

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from gpu import correct_models
from gpu.machine import Machine
from gpu.results import Case, Results, Row
from torch import Tensor

from peerscale.data.store import file_sha256
from peerscale.files import PACKAGE
from peerscale.ops.backends import BACKENDS
from peerscale.ops.operators import Operators

REFERENCE = BACKENDS["reference"]
ALLOWED = {"float32": 2e-5, "bfloat16": 2 * 2**-7}
"""A few roundings of a sum; two of a result."""

Check = tuple[str, float]
"""What was compared, and its error as a multiple of what is allowed."""


class Shape(NamedTuple):
    """T tokens that retrieve J rows each, of a table of N rows of D numbers."""

    T: int
    D: int
    N: int
    J: int


FULL = [Shape(37, D, N, J) for D, N, J in itertools.product((24, 40, 256, 1024), (256, 4096, 65536), (1, 64, 128))] + [
    Shape(0, 40, 256, 64),  # an empty batch
    Shape(1031, 1024, 65536, 128),  # beyond the cache, every row several times
    Shape(4099, 256, 256, 128),  # two thousand pairs a row
    Shape(1, 24, 65536, 1),
]
TINY = [Shape(5, 24, 256, 4), Shape(0, 8, 16, 2)]


def cases(machine: Machine) -> Iterator[Case]:
    """The operators at every shape, then the methods' models."""
    for shape in TINY if machine.rehearse else FULL:
        for dtype in ALLOWED:
            name = f"operators T{shape.T} D{shape.D} N{shape.N} J{shape.J} {dtype}"
            labels = {**shape._asdict(), "dtype": dtype}
            yield Case(name, labels, partial(judged, operator_checks, machine, shape, getattr(torch, dtype)))
    yield Case("backbone", {}, partial(judged, backbone_checks, machine))
    for method in correct_models.METHODS:
        yield Case(f"model {method}", {"method": method}, partial(judged, correct_models.checks, machine, method))


def stamp() -> str:
    """Of all that the verdict is about."""
    sources = [*PACKAGE.glob("ops/*"), *PACKAGE.glob("layers/**/*.py"), *PACKAGE.glob("model/*.py")]
    files = sorted(path for path in sources if path.is_file())
    return "".join(file_sha256(path)[:4] for path in files)


def verdict(folder: Path) -> tuple[bool, str]:
    """Whether the backend may be trusted, and why, in one line."""
    results = Results(folder, "correct", stamp())
    wrong = [name for name, row in results.rows.items() if row.get("wrong") or "reason" in row]
    if wrong:
        return False, f"WRONG: {len(wrong)} of {len(results.rows)} cases, such as {wrong[0]}"
    if not results.finished:
        return False, f"NOT KNOWN: {len(results.rows)} cases were right, and some are to come"
    return True, f"RIGHT: all {len(results.rows)} cases"


def judged(function, *arguments) -> Row:  # pyrefly: ignore
    """The worst of some checks, and those that are wrong."""
    torch.manual_seed(0)
    found: list[Check] = function(*arguments)
    what, worst = max(found, key=lambda check: check[1])
    return {"checks": len(found), "worst": what, "of_allowed": worst, "wrong": [w for w, e in found if not e <= 1]}


def error(actual: Tensor, expected: Tensor, allowed: float) -> float:
    """See the module's docstring; infinite for another shape, or a value that is not finite."""
    if actual.shape != expected.shape or not actual.isfinite().all():
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    scale = max(expected.abs().max().item(), 1e-30)
    return (actual.double() - expected).abs().max().item() / scale / allowed


def operator_checks(machine: Machine, shape: Shape, dtype: torch.dtype) -> list[Check]:
    """All that concerns tables."""
    (T, D, N, J), allowed = shape, ALLOWED[str(dtype).removeprefix("torch.")]
    with torch.device(machine.type):
        rows = torch.randint(N, (T, J))
        rows[:, -1] = rows[:, 0]
        drawn = torch.randn(T, D), torch.randn(N, D) / D**0.5, torch.randn(N, D), torch.rand(T, J) - 0.2
        x, w_down, w_up, gates = (tensor.to(dtype) for tensor in drawn)
        # As training has them: rounding the tables again changes nothing, so that the definition needs none.
        w_down, w_up, gates, found = w_down.float(), w_up.float(), gates.float(), []
        # ReLU has a kink, where rounding decides on the gradient: few pairs, so that none lies there.
        for activation in ("gelu", "relu") if T * J < 500 else ("gelu",):
            names = [
                f"{activation} experts",
                *(f"{activation} gradient of {n}" for n in ("x", "w_down", "w_up", "gates")),
            ]
            compared = _against_reference(
                machine.operators,
                lambda operators, x, down, up, gates, activation=activation: operators.single_neuron_experts(
                    x, down, up, rows, gates, activation
                ),
                [x, w_down, w_up, gates],
                allowed,
            )
            found += zip(names, compared, strict=True)
        names = ["weighted rows", "gradient of the table", "gradient of the weights"]
        compared = _against_reference(
            machine.operators,
            lambda operators, table, weights: operators.weighted_rows(table, rows, weights, dtype),
            [w_up, gates],
            allowed,
        )
        found += zip(names, compared, strict=True)
        if rows.numel() and dtype == torch.float32:
            found += retrieval_checks(machine.operators, shape)
    return found


def _against_reference(operators: Operators, function, tensors: Sequence[Tensor], allowed: float) -> list[float]:
    """Errors of the result and of the gradients of all tensors, for a probe that is the same for both."""
    both = []
    for backend, taken in ((operators, tensors), (REFERENCE, [tensor.double() for tensor in tensors])):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in taken]
        y = function(backend, *leaves)
        probe = torch.sin(torch.arange(y.numel(), dtype=torch.float64)).view_as(y).to(y.dtype)
        both.append([y.detach(), *torch.autograd.grad((y * probe).sum(), leaves)])
    return [error(actual, expected, allowed) for actual, expected in zip(*both, strict=True)]


def retrieval_checks(operators: Operators, shape: Shape) -> list[Check]:
    """Product keys: that the rows found have the scores told, that none are better, and the gradients of the scores."""
    side, allowed = round(shape.N**0.5), ALLOWED["float32"]
    top_k = min(16, side, shape.J)
    heads, half = shape.J // top_k, shape.D // 2
    found = []
    for sets in {1, heads}:
        query, keys = torch.randn(shape.T, heads, 2, half), torch.randn(sets, 2, side, half) / half**0.5
        leaves = [tensor.requires_grad_() for tensor in (query, keys)]
        scores, rows = operators.product_key_top_k(query, keys, top_k)
        exact_leaves = [tensor.detach().double().requires_grad_() for tensor in leaves]
        exact = _scores(*exact_leaves, rows)
        best, _ = REFERENCE.product_key_top_k(query.detach().double(), keys.detach().double(), top_k)
        distinct = rows.sort(dim=-1).values.diff(dim=-1).ne(0).all()
        probe = torch.sin(torch.arange(scores.numel(), dtype=torch.float64)).view_as(scores)
        gradients = torch.autograd.grad((scores * probe.float()).sum(), leaves)
        expected = torch.autograd.grad((exact * probe).sum(), exact_leaves)
        found += [
            (f"scores of {sets} key sets", error(scores.detach(), exact.detach(), allowed)),
            (f"best scores of {sets} key sets", error(scores.detach(), best, allowed)),
            (f"distinct rows of {sets} key sets", 0.0 if distinct else float("inf")),
            (f"gradient of queries, {sets} key sets", error(gradients[0], expected[0], allowed)),
            (f"gradient of {sets} key sets", error(gradients[1], expected[1], allowed)),
        ]
    return found


def _scores(query_THSC: Tensor, keys_GSNC: Tensor, rows_THK: Tensor) -> Tensor:
    """The scores of given rows, by their definition."""
    side, heads = keys_GSNC.shape[2], query_THSC.shape[1]
    keys_HSNC = keys_GSNC.expand(heads, -1, -1, -1)
    head = torch.arange(heads)[None, :, None]
    first, second = keys_HSNC[head, 0, rows_THK // side], keys_HSNC[head, 1, rows_THK % side]
    return torch.einsum("thc,thkc->thk", query_THSC[:, :, 0], first) + torch.einsum(
        "thc,thkc->thk", query_THSC[:, :, 1], second
    )


def backbone_checks(machine: Machine) -> list[Check]:
    """The operators of the rest of the model: RMSNorm, rotary positions, cross-entropy."""
    B, T, H, C, V = (2, 8, 2, 4, 32) if machine.rehearse else (4, 64, 4, 32, 8192)
    allowed = ALLOWED["float32"]
    with torch.device(machine.type):
        x, weight, qkv = torch.randn(B, T, 2 * H * C), torch.rand(2 * H * C), torch.randn(B, T, 3, H, 2 * C)
        angles = torch.rand(T, C)
        norm = _against_reference(machine.operators, lambda o, x, w: o.rms_norm(x, w, 1e-6), [x, weight], allowed)
        turned = _against_reference(
            machine.operators,
            lambda o, q: o.rotary(q, angles.cos().to(q.dtype), angles.sin().to(q.dtype)),
            [qkv],
            allowed,
        )
        logits, targets = torch.randn(B * T, V), torch.randint(V, (B * T,))
        exact = logits.double()
        losses, expected = (
            o.cross_entropy_(z, targets, 0.5) for o, z in ((machine.operators, logits), (REFERENCE, exact))
        )
    names = ["RMSNorm", "gradient of its input", "gradient of its weight", "rotary", "gradient of rotary"]
    entropy = [error(losses, expected, allowed), error(logits, exact, allowed)]
    return [*zip(names, [*norm, *turned], strict=True), *zip(["cross-entropy", "its gradient"], entropy, strict=True)]
