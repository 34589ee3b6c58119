"""Row-sparse AdamW against torch's: one optimiser a row, stepped when the row was retrieved."""

import copy

import pytest
import torch
from test_operators import DEVICE, OTHERS, RUNNABLE
from torch import Tensor, nn

from peerscale.layers import Peer
from peerscale.ops.backends import choose_operators
from peerscale.ops.pairs import collect_row_gradients, collected_gradients, total_gradient
from peerscale.ops.row_sparse_adamw import RowSparseAdamW

RATES = {"lr": 0.03, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
N, D, T, J = 30, 5, 4, 3

Batch = tuple[Tensor, Tensor, Tensor]
"""Rows, weights and the output's gradient."""


def table(dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.randn(N, D, dtype=dtype))


def batches(n: int, dtype: torch.dtype = torch.float64) -> list[Batch]:
    """Of some passes; a row may repeat, and the last ten are never retrieved."""
    return [
        (torch.randint(N - 10, (T, J)), torch.randn(T, J, dtype=dtype), torch.randn(T, D, dtype=dtype))
        for _ in range(n)
    ]


def backward(name: str, parameter: nn.Parameter, batch: Batch) -> None:
    rows, weights, grad = batch
    operators = choose_operators(name, DEVICE)
    operators.weighted_rows(parameter, rows, weights.clone().requires_grad_()).backward(grad)


def row_sparse(*tables: nn.Parameter, **rates) -> RowSparseAdamW:
    return RowSparseAdamW([{"params": list(tables), "row_sparse": True}], **RATES | rates)


def train(name: str, parameter: nn.Parameter, optimizer: torch.optim.Optimizer, passes: list[Batch]) -> None:
    for batch in passes:
        optimizer.zero_grad()
        backward(name, parameter, batch)
        optimizer.step()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", RUNNABLE)
def test_each_row_is_an_adamw_of_its_own(name, dtype, tolerance):
    parameter = table(dtype)
    rows = [nn.Parameter(row.double()) for row in parameter.detach()]
    own = [torch.optim.AdamW([row], **RATES) for row in rows]
    optimizer = row_sparse(parameter)
    for batch in batches(8, dtype):
        train(name, parameter, optimizer, [batch])
        indices, weights, grad = batch
        for i in indices.unique().tolist():
            mine = indices == i
            rows[i].grad = ((weights * mine).sum(1)[:, None] * grad).sum(0).double()
            own[i].step()
        for each in (optimizer, *own):  # as a schedule would
            each.param_groups[0]["lr"] *= 0.9
        expected = torch.stack([row.detach() for row in rows])
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=tolerance, atol=tolerance)
    # Rows that are never retrieved have neither decay nor moments.
    state = optimizer.state[parameter]
    assert not any(state[key][-10:].any() for key in ("step", "exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("name", OTHERS)
def test_backward_passes_add_up_until_zero_grad(name):
    one, other = table(), table()
    other.data.copy_(one.data)
    first, second, third = batches(3)
    optimizers = row_sparse(one), row_sparse(other)
    backward(name, one, third)
    optimizers[0].zero_grad()
    backward(name, one, first)
    backward(name, one, second)
    backward(name, other, tuple(torch.cat(parts) for parts in zip(first, second, strict=True)))
    for optimizer in optimizers:
        optimizer.step()
    torch.testing.assert_close(one, other)
    assert one.grad is None


@pytest.mark.parametrize("name", OTHERS)
def test_compact_gradients_are_the_dense_ones(name):
    model = Peer(6, 16, 2, 4, 8, operators=choose_operators(name, DEVICE)).double()
    x = torch.randn(9, 6, dtype=torch.float64)
    model(x).square().sum().backward()
    dense = [parameter.grad for parameter in model.expert_tables()]
    for parameter in model.expert_tables():
        parameter.grad = None
        collect_row_gradients(parameter)
    model(x).square().sum().backward()
    for parameter, expected in zip(model.expert_tables(), dense, strict=True):
        assert parameter.grad is None
        total = total_gradient(collected_gradients(parameter))
        torch.testing.assert_close(total.pairs.operators.table_gradient(total), expected)
    rest = [p for p in model.parameters() if p.grad is not None]
    norm = torch.stack([p.grad.norm() for p in rest]).norm()
    torch.testing.assert_close(nn.utils.clip_grad_norm_(model.parameters(), 1e9), norm)
    twin = copy.deepcopy(model)  # collects nothing
    twin(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in twin.expert_tables())


def test_other_groups_are_torchs_own_adamw():
    one, other = nn.Linear(4, 3), nn.Linear(4, 3)
    other.load_state_dict(one.state_dict())
    parameter = table()
    mixed = RowSparseAdamW(
        [{"params": one.parameters(), "weight_decay": 0.5}, {"params": [parameter], "row_sparse": True}], **RATES
    )
    plain = torch.optim.AdamW(other.parameters(), **RATES | {"weight_decay": 0.5})
    x, [batch] = torch.randn(7, 4), batches(1)
    for _ in range(3):
        for layer, optimizer in ((one, mixed), (other, plain)):
            optimizer.zero_grad()
            layer(x).square().sum().backward()
            if optimizer is mixed:
                backward("cpp", parameter, batch)
            optimizer.step()
    assert torch.equal(one.weight, other.weight) and torch.equal(one.bias, other.bias)


def test_a_step_without_gradients_changes_nothing_and_a_closure_computes_them():
    parameter, [batch] = table(), batches(1)
    twin = nn.Parameter(parameter.detach().clone())
    optimizer, other = row_sparse(parameter), row_sparse(twin)
    optimizer.step()
    assert torch.equal(parameter, twin) and not optimizer.state
    backward("cpp", parameter, batch)
    optimizer.step()

    def closure():
        assert torch.is_grad_enabled()
        backward("cpp", twin, batch)
        return 3.5

    assert other.step(closure) == 3.5
    assert torch.equal(parameter, twin)


def test_updates_do_not_depend_on_the_number_of_threads(threads):
    passes = [(torch.randint(200, (64, 12)), torch.randn(64, 12), torch.randn(64, 33)) for _ in range(3)]
    start, results = torch.randn(200, 33), []
    for n in (1, 3):
        threads(n)
        parameter = nn.Parameter(start.clone())
        train("cpp", parameter, row_sparse(parameter), passes)
        results.append(parameter.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("name", RUNNABLE)
def test_dense_and_collected_gradients_make_one_step(name):
    """Such as those of a penalty on the whole table."""
    one, other = table(), table()
    other.data.copy_(one.data)
    optimizers = row_sparse(one), torch.optim.AdamW([other], **RATES)
    for indices, weights, grad in batches(3):
        for parameter, optimizer in zip((one, other), optimizers, strict=True):
            optimizer.zero_grad()
            if parameter is one:
                backward(name, parameter, (indices, weights, grad))
            else:
                ((parameter[indices] * weights[:, :, None]).sum(1) * grad).sum().backward()
            (0.1 * parameter.square().sum()).backward()
            optimizer.step()
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_table_need_not_be_contiguous(name):
    one, other = table(), nn.Parameter(torch.randn(D, N, dtype=torch.float64).T)
    other.data.copy_(one.data)
    assert not other.is_contiguous()
    passes = batches(2)
    for parameter in (one, other):
        train(name, parameter, row_sparse(parameter), passes)
    torch.testing.assert_close(one, other)
