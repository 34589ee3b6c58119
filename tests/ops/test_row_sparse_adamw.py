"""Row-sparse AdamW against torch's: one optimiser a row, stepped when the row was retrieved."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from peerscale.layers import Peer, Pkm
from peerscale.ops.backends import BACKENDS, choose_operators
from peerscale.ops.operators import collect_row_gradients, collected_gradients, total_gradient
from peerscale.ops.row_sparse_adamw import RowSparseAdamW

RATES = {"lr": 0.03, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
N, D, T, J = 30, 5, 4, 3
DEVICE = torch.get_default_device().type
# Triton's turn is in test_triton.
RUNNABLE = [name for name in BACKENDS if BACKENDS[name].obstacle(DEVICE) is None]
COMPACT = [name for name in RUNNABLE if name != "reference"]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def operators(name: str):
    return choose_operators(name, DEVICE)


def table(dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.randn(N, D, dtype=dtype))


def batches(n: int, n_rows: int = N, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Rows, weights and output gradients of some passes; a row may repeat."""
    return [
        (torch.randint(n_rows, (T, J)), torch.randn(T, J, dtype=dtype), torch.randn(T, D, dtype=dtype))
        for _ in range(n)
    ]


def backward(name: str, parameter: nn.Parameter, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    rows, weights, grad = batch
    operators(name).weighted_rows(parameter, rows, weights.clone().requires_grad_()).backward(grad)


def row_sparse(*tables: nn.Parameter, **rates) -> RowSparseAdamW:
    return RowSparseAdamW([{"params": list(tables), "row_sparse": True}], **RATES | rates)


@pytest.mark.parametrize("name", RUNNABLE)
def test_each_row_is_an_adamw_of_its_own(name):
    parameter = table()
    rows = [nn.Parameter(row.clone()) for row in parameter.detach()]
    own = [torch.optim.AdamW([row], **RATES) for row in rows]
    optimizer = row_sparse(parameter)
    untouched = set(range(N))
    for batch in batches(8, n_rows=20):
        indices, weights, grad = batch
        optimizer.zero_grad()
        backward(name, parameter, batch)
        optimizer.step()
        for i in indices.unique().tolist():
            mine = indices == i
            rows[i].grad = ((weights * mine).sum(1)[:, None] * grad).sum(0)
            own[i].step()
            untouched.discard(i)
        torch.testing.assert_close(parameter.detach(), torch.stack([row.detach() for row in rows]))
    # Ten rows are never retrieved: without decay and moments.
    state = optimizer.state[parameter]
    assert len(untouched) >= 10
    assert not any(state[key][list(untouched)].any() for key in ("step", "exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", RUNNABLE)
@pytest.mark.parametrize("layer", [Peer, Pkm])
def test_equals_dense_adamw_when_every_row_is_retrieved(layer, name, dtype, tolerance):
    # Four rows, of which each of 40 tokens retrieves some. No query norm: under it the gradient of the query's bias is
    # rounding noise, which Adam turns into steps of full size.
    model = layer(6, 4, 2, 2, 8, query_norm=False, operators=operators(name)).to(dtype)
    dense, sparse = copy.deepcopy(model), model
    tables = sparse.expert_tables()
    rest = [p for p in sparse.parameters() if all(p is not t for t in tables)]
    optimizers = [
        torch.optim.AdamW(dense.parameters(), **RATES),
        RowSparseAdamW([{"params": rest}, {"params": tables, "row_sparse": True}], **RATES),
    ]
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8) for optimizer in optimizers]
    for _ in range(5):
        x, target = torch.randn(40, 6, dtype=dtype), torch.randn(40, 6, dtype=dtype)
        assert len(sparse.retrieve(x)[1].unique()) == 4
        for twin, optimizer, schedule in zip((dense, sparse), optimizers, schedules, strict=True):
            optimizer.zero_grad()
            (twin(x) - target).square().mean().backward()
            optimizer.step()
            schedule.step()
    assert optimizers[1].param_groups[1]["lr"] == optimizers[0].param_groups[0]["lr"] < RATES["lr"]
    for one, other in zip(sparse.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", COMPACT)
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


@pytest.mark.parametrize("name", COMPACT)
def test_compact_gradients_are_the_dense_ones(name):
    model = Peer(6, 16, 2, 4, 8, operators=operators(name)).double()
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


@pytest.mark.parametrize("name", COMPACT)
def test_goes_on_exactly_from_its_saved_state(name):
    parameter, passes = table(torch.float32), batches(6, dtype=torch.float32)
    optimizer = row_sparse(parameter)

    def train(parameter, optimizer, passes):
        for batch in passes:
            optimizer.zero_grad()
            backward(name, parameter, batch)
            optimizer.step()

    train(parameter, optimizer, passes[:3])
    file = io.BytesIO()
    torch.save((parameter.detach(), optimizer.state_dict()), file)
    train(parameter, optimizer, passes[3:])
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed = nn.Parameter(weights)
    second = row_sparse(resumed, lr=1.0)
    second.load_state_dict(state)
    train(resumed, second, passes[3:])
    assert torch.equal(resumed, parameter)


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


def test_a_step_without_gradients_changes_nothing():
    parameter = table()
    before = parameter.detach().clone()
    optimizer = row_sparse(parameter)
    optimizer.step()
    assert torch.equal(parameter, before) and not optimizer.state


def test_closure_computes_the_gradients():
    parameter, [batch] = table(), batches(1)
    twin = nn.Parameter(parameter.detach().clone())
    optimizers = row_sparse(parameter), row_sparse(twin)
    backward("cpp", parameter, batch)
    optimizers[0].step()

    def closure():
        assert torch.is_grad_enabled()
        backward("cpp", twin, batch)
        return 3.5

    assert optimizers[1].step(closure) == 3.5
    assert torch.equal(parameter, twin)


def test_clipping_and_dense_optimisers_do_not_see_the_collected_gradients():
    model = Peer(6, 16, 2, 4, 8)
    for parameter in model.expert_tables():
        collect_row_gradients(parameter)
    model(torch.randn(9, 6)).square().sum().backward()
    rest = [p for p in model.parameters() if p.grad is not None]
    assert len(rest) == len(list(model.parameters())) - 2
    expected = torch.stack([p.grad.norm() for p in rest]).norm()
    torch.testing.assert_close(nn.utils.clip_grad_norm_(model.parameters(), 1e9), expected)


def test_copies_of_a_model_collect_nothing():
    model = Peer(6, 16, 2, 4, 8)
    row_sparse(*model.expert_tables())
    twin = copy.deepcopy(model)
    twin(torch.randn(9, 6)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in twin.expert_tables())


def test_updates_do_not_depend_on_the_number_of_threads():
    threads = torch.get_num_threads()
    passes = [(torch.randint(200, (64, 12)), torch.randn(64, 12), torch.randn(64, 33)) for _ in range(3)]
    start, results = torch.randn(200, 33), []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            parameter = nn.Parameter(start.clone())
            optimizer = row_sparse(parameter)
            for batch in passes:
                optimizer.zero_grad()
                backward("cpp", parameter, batch)
                optimizer.step()
            results.append(parameter.detach())
    finally:
        torch.set_num_threads(threads)
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
    for parameter in (one, other):
        optimizer = row_sparse(parameter)
        torch.manual_seed(1)
        for batch in batches(2):
            optimizer.zero_grad()
            backward(name, parameter, batch)
            optimizer.step()
    torch.testing.assert_close(one, other)
