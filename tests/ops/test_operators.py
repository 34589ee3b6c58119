"""Every backend against the definition, forward and all gradients."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from peerscale.ops.backends import BACKENDS, choose_operators
from peerscale.ops.pairs import Pairs, TableGradient

REFERENCE = BACKENDS["reference"]
DEVICE = torch.get_default_device().type
# Triton's turn is in test_triton.
RUNNABLE = [name for name in BACKENDS if BACKENDS[name].obstacle(DEVICE) is None]
OTHERS = [name for name in RUNNABLE if name != "reference"]

# Tokens, width, rows of a table, rows a token: one head with top_k 1; repeated rows; widths that are and are not whole
# vectors; no tokens; groups of four rows with and without a rest; more rows a token than a block of a GPU kernel has.
SHAPES = [
    (5, 3, 9, 1),
    (1, 1, 1, 4),
    (33, 17, 4, 7),
    (0, 4, 9, 3),
    (64, 64, 400, 12),
    (12, 100, 30, 9),
    (3, 70, 50, 40),
]
# A table beyond the cache whose rows are read several times, which the C++ backend goes through row by row.
LARGE = (90, 300, 4000, 128)


def backend(name: str):
    return choose_operators(name, DEVICE)


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """x, w_down, w_up and gates; rows, that repeat within a token."""
    T, D, N, J = shape
    x, w_down, w_up = torch.randn(T, D), torch.randn(N, D) / D**0.5, torch.randn(N, D)
    rows = torch.randint(0, N, (T, J))
    rows[:, -1] = rows[:, 0]
    return [tensor.to(dtype) for tensor in (x, w_down, w_up, torch.rand(T, J) - 0.2)], rows


def results(function, tensors: list[Tensor]) -> list[Tensor]:
    """The output of `function` and its gradients, for a probe that is the same in every call."""
    tensors = [tensor.clone().requires_grad_() for tensor in tensors]
    y = function(*tensors)
    probe = torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)
    return [y.detach(), *torch.autograd.grad((y * probe).sum(), tensors)]


def experts(operators, tensors: list[Tensor], rows: Tensor, activation: str = "gelu") -> list[Tensor]:
    return results(lambda *t: operators.single_neuron_experts(*t[:3], rows, t[3], activation), tensors)


def assert_same(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        scale = max(1.0, e.abs().max().item()) if e.numel() else 1.0
        torch.testing.assert_close(a.double(), e.double(), rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("shape", [*SHAPES, LARGE], ids=str)
@pytest.mark.parametrize("name", OTHERS)
def test_the_parts_equal_their_definition(name, shape):
    (x, table, _, weights), rows = inputs(shape, torch.float64)
    found = []
    for operators in (backend(name), REFERENCE):
        pairs = Pairs(operators, rows, len(table))
        gradient = TableGradient(pairs, weights, x)
        changed, steps = table.clone(), table.new_zeros(len(table))
        state = {"exp_avg": torch.zeros_like(table), "exp_avg_sq": torch.zeros_like(table), "step": steps}
        if rows.numel():
            rates = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
            operators.adamw_rows(gradient, changed, state, rates)
        found.append([
            operators.row_dot_products(x, table, pairs), operators.weighted_row_sum(table, pairs, weights),
            operators.table_gradient(gradient), changed, *state.values(),
        ])  # fmt: skip
    assert_same(*found, 1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
@pytest.mark.parametrize("shape", [*SHAPES, LARGE], ids=str)
@pytest.mark.parametrize("name", OTHERS)
def test_the_operators_equal_their_definition(name, shape, dtype, tolerance):
    """In float64: the definition's own float32 is no more accurate than the backend's."""
    tensors, rows = inputs(shape, dtype)
    exact = [tensor.double() for tensor in tensors]
    for activation in ("gelu", "relu"):
        actual = experts(backend(name), tensors, rows, activation)
        assert_same(actual, experts(REFERENCE, exact, rows, activation), tolerance)
    actual = results(lambda t, w: backend(name).weighted_rows(t, rows, w), tensors[2:])
    assert_same(actual, results(lambda t, w: REFERENCE.weighted_rows(t, rows, w), exact[2:]), tolerance)


def test_definition_equals_a_loop_over_experts():
    (x, w_down, w_up, gates), rows = inputs((6, 5, 9, 4), torch.float64)
    y = torch.zeros_like(x)
    for t in range(6):
        for j in range(4):
            i = rows[t, j]
            y[t] += gates[t, j] * F.gelu(x[t] @ w_down[i]) * w_up[i]
    torch.testing.assert_close(REFERENCE.single_neuron_experts(x, w_down, w_up, rows, gates, "gelu"), y)


def test_cpp_gelu_is_accurate_in_float32():
    z = torch.cat([torch.linspace(-15, 15, 20001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 80.0, -80.0, 3e38])])
    found = results(lambda x: backend("cpp").gate(x, torch.ones_like(x), "gelu"), [z])
    for actual, expected in zip(found, results(F.gelu, [z.double()]), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("name", RUNNABLE)
def test_not_a_number_is_not_hidden(name, activation):
    (x, w_down, w_up, gates), rows = inputs((3, 4, 5, 2), torch.float32)
    x[1, 2] = float("nan")
    y = backend(name).single_neuron_experts(x, w_down, w_up, rows, gates, activation)
    assert y.isnan().any(dim=1).tolist() == [False, True, False]


@pytest.mark.parametrize("shape", [(64, 48, 100, 12), LARGE], ids=str)
def test_cpp_results_do_not_depend_on_the_number_of_threads(shape, threads):
    tensors, rows = inputs(shape, torch.float32)
    found = []
    for n in (1, 3):
        threads(n)
        found.append(experts(backend("cpp"), tensors, rows))
    assert all(torch.equal(one, three) for one, three in zip(*found, strict=True))


@pytest.mark.parametrize("wrong", [-1, 9])
@pytest.mark.parametrize("name", ["cpp", "torch"])
def test_rows_outside_the_table_are_refused(name, wrong):
    (x, w_down, w_up, gates), rows = inputs((5, 3, 9, 2), torch.float32)
    rows[3, 1] = wrong
    with pytest.raises(IndexError, match=r"0\.\.8"):
        backend(name).single_neuron_experts(x, w_down, w_up, rows, gates, "gelu")
    with pytest.raises(IndexError, match=r"0\.\.8"):
        backend(name).weighted_rows(w_up, rows, gates)


@pytest.mark.parametrize("name", OTHERS)
def test_no_gathered_row_is_materialised(name):
    T, D, N, J = shape = (7, 40, 12, 9)
    tensors, rows = inputs(shape, torch.float32)
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(
                tensor.numel() for tensor in torch.utils._pytree.tree_leaves(out) if isinstance(tensor, Tensor)
            )
            return out

    with Sizes():
        experts(backend(name), tensors, rows)
    # Bytes: that is how Triton's interpreter looks at a table.
    assert N * D <= max(sizes) <= 4 * N * D < T * J * D


@pytest.mark.parametrize("name", OTHERS)
def test_inputs_may_be_views_and_only_the_gradients_asked_for_are_computed(name):
    (x, w_down, w_up, gates), rows = inputs((6, 4, 8, 4), torch.float64)
    whole = REFERENCE.single_neuron_experts(x, w_down, w_up, rows, gates, "gelu")
    x, w_down, w_up, gates, rows = (tensor.T.contiguous().T for tensor in (x, w_down, w_up, gates, rows))
    assert not any(view.is_contiguous() for view in (x, w_down, w_up, gates, rows))
    gates.requires_grad_()
    y = backend(name).single_neuron_experts(x, w_down, w_up, rows, gates, "gelu")
    torch.testing.assert_close(y, whole)
    y.sum().backward()
    assert gates.grad is not None and x.grad is None and w_down.grad is None and w_up.grad is None


@pytest.mark.parametrize("name", RUNNABLE)
def test_backends_can_be_copied_and_pickled_with_a_model(name):
    for twin in (copy.deepcopy(BACKENDS[name]), pickle.loads(pickle.dumps(BACKENDS[name]))):
        assert type(twin) is type(BACKENDS[name])


def test_other_devices_and_types_run_on_torch():
    (x, w_down, w_up, gates), rows = inputs((6, 4, 8, 4), torch.float32)
    on_meta = [tensor.to("meta") for tensor in (x, w_down, w_up, rows, gates)]
    assert BACKENDS["cpp"].single_neuron_experts(*on_meta, "gelu").shape == x.shape
    half = [tensor.bfloat16() for tensor in (x, w_down, w_up, gates)]
    y = BACKENDS["cpp"].single_neuron_experts(*half[:3], rows, half[3], "gelu")
    exact = REFERENCE.single_neuron_experts(x, w_down, w_up, rows, gates, "gelu")
    torch.testing.assert_close(y.float(), exact, rtol=0.1, atol=0.1)
