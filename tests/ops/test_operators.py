"""Every backend against the definition, forward and all gradients."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from peerscale.ops.backends import BACKENDS, choose_operators
from peerscale.ops.operators import Pairs, TableGradient

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


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


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
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("shape", [*SHAPES, LARGE], ids=str)
@pytest.mark.parametrize("name", OTHERS)
def test_experts_equal_the_definition(name, shape, activation, dtype, tolerance):
    tensors, rows = inputs(shape, dtype)

    def experts(operators, x, w_down, w_up, gates):
        return operators.single_neuron_experts(x, w_down, w_up, rows, gates, activation)

    actual = results(lambda *t: experts(backend(name), *t), tensors)
    # In float64: the definition's own float32 is no more accurate than the backend's.
    expected = results(lambda *t: experts(REFERENCE, *t), [tensor.double() for tensor in tensors])
    assert_same(actual, expected, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
@pytest.mark.parametrize("shape", [*SHAPES, LARGE], ids=str)
@pytest.mark.parametrize("name", OTHERS)
def test_weighted_rows_equal_the_definition(name, shape, dtype, tolerance):
    (_, table, _, weights), rows = inputs(shape, dtype)
    actual = results(lambda t, w: backend(name).weighted_rows(t, rows, w), [table, weights])
    expected = results(lambda t, w: REFERENCE.weighted_rows(t, rows, w), [table.double(), weights.double()])
    assert_same(actual, expected, tolerance)


def test_definition_equals_a_loop_over_experts():
    (x, w_down, w_up, gates), rows = inputs((6, 5, 9, 4), torch.float64)
    y = torch.zeros_like(x)
    for t in range(6):
        for j in range(4):
            i = rows[t, j]
            y[t] += gates[t, j] * F.gelu(x[t] @ w_down[i]) * w_up[i]
    torch.testing.assert_close(REFERENCE.single_neuron_experts(x, w_down, w_up, rows, gates, "gelu"), y)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("name", OTHERS)
def test_gradcheck(name, activation):
    tensors, rows = inputs((4, 3, 5, 3), torch.float64)
    x, w_down, w_up, gates = (tensor.requires_grad_() for tensor in tensors)
    operators = backend(name)
    assert torch.autograd.gradcheck(
        lambda *t: operators.single_neuron_experts(t[0], t[1], t[2], rows, t[3], activation), (x, w_down, w_up, gates)
    )
    assert torch.autograd.gradcheck(lambda t, w: operators.weighted_rows(t, rows, w), (w_up, gates))


def test_cpp_gelu_is_accurate_in_float32():
    z = torch.cat([torch.linspace(-15, 15, 20001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 80.0, -80.0, 3e38])])
    one, rows = torch.ones(1, 1), torch.zeros(len(z), 1, dtype=torch.long)

    def gelu(x):
        return backend("cpp").single_neuron_experts(x, one, one, rows, torch.ones(len(x), 1), "gelu")

    x, exact = z[:, None].clone().requires_grad_(), z.double().requires_grad_()
    value, expected = gelu(x), F.gelu(exact)
    torch.testing.assert_close(value.squeeze(1).double(), expected, rtol=1e-6, atol=1e-6)
    [slope], [expected_slope] = torch.autograd.grad(value.sum(), x), torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(slope.squeeze(1).double(), expected_slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("name", RUNNABLE)
def test_not_a_number_is_not_hidden(name, activation):
    (x, w_down, w_up, gates), rows = inputs((3, 4, 5, 2), torch.float32)
    x[1, 2] = float("nan")
    y = backend(name).single_neuron_experts(x, w_down, w_up, rows, gates, activation)
    assert y.isnan().any(dim=1).tolist() == [False, True, False]


@pytest.mark.parametrize("shape", [(64, 48, 100, 12), LARGE], ids=str)
def test_cpp_results_do_not_depend_on_the_number_of_threads(shape):
    tensors, rows = inputs(shape, torch.float32)
    threads = torch.get_num_threads()

    def run(n):
        torch.set_num_threads(n)
        return results(lambda x, u, v, g: backend("cpp").single_neuron_experts(x, u, v, rows, g, "gelu"), tensors)

    try:
        assert all(torch.equal(one, three) for one, three in zip(run(1), run(3), strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("wrong", [-1, 9])
def test_cpp_refuses_rows_outside_the_table(wrong):
    (x, w_down, w_up, gates), rows = inputs((5, 3, 9, 2), torch.float32)
    rows[3, 1] = wrong
    with pytest.raises(IndexError, match=r"0\.\.8"):
        backend("cpp").single_neuron_experts(x, w_down, w_up, rows, gates, "gelu")
    with pytest.raises(IndexError, match=r"0\.\.8"):
        backend("cpp").weighted_rows(w_up, rows, gates)


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
        results(lambda *t: backend(name).single_neuron_experts(*t[:3], rows, t[3], "gelu"), tensors)
    # Bytes: that is how Triton's interpreter looks at a table.
    assert N * D <= max(sizes) <= 4 * N * D < T * J * D


@pytest.mark.parametrize("name", OTHERS)
def test_inputs_may_be_views(name):
    (x, w_down, w_up, gates), rows = inputs((6, 4, 8, 4), torch.float64)
    whole = REFERENCE.single_neuron_experts(x, w_down, w_up, rows, gates, "gelu")
    views = (x.T.contiguous().T, w_down.T.contiguous().T, w_up.T.contiguous().T)
    assert not any(view.is_contiguous() for view in views)
    rows, gates = rows.T.contiguous().T, gates.T.contiguous().T
    torch.testing.assert_close(backend(name).single_neuron_experts(*views, rows, gates, "gelu"), whole)


@pytest.mark.parametrize("name", OTHERS)
def test_only_the_gradients_asked_for(name):
    (x, w_down, w_up, gates), rows = inputs((6, 4, 8, 4), torch.float64)
    gates.requires_grad_()
    backend(name).single_neuron_experts(x, w_down, w_up, rows, gates, "gelu").sum().backward()
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


@pytest.mark.parametrize("name", OTHERS)
def test_torch_compile_takes_the_operators(name):
    (x, w_down, w_up, gates), rows = inputs((6, 4, 8, 4), torch.float64)
    x.requires_grad_()
    operators = backend(name)

    def layer(x):
        return torch.relu(operators.single_neuron_experts(torch.relu(x), w_down, w_up, rows, gates, "gelu"))

    y, compiled = layer(x), torch.compile(layer, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, y)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), x)[0] for out in (compiled, y)))
