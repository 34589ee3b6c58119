"""Training with expert tables in fp32 that are read from bf16 copies, against formulas written out in float64."""

import copy
import pickle

import pytest
import torch
from test_operators import DEVICE, OTHERS, RUNNABLE
from torch import Tensor, nn

from peerscale.layers import Peer, Pkm
from peerscale.ops.backends import choose_operators
from peerscale.ops.row_sparse_adamw import RowSparseAdamW

D, N, HEADS, TOP_K = 12, 25, 2, 3
# A large eps, so that a step tells the size of a gradient and not its sign alone.
RATES = {"lr": 0.03, "betas": (0.9, 0.95), "eps": 0.1, "weight_decay": 0.1}
OPTIMIZERS = ["adamw", "row_sparse_adamw"]


@pytest.fixture(params=[Peer, Pkm])
def kind(request: pytest.FixtureRequest) -> type[Peer] | type[Pkm]:
    return request.param


def make(kind: type[Peer] | type[Pkm], name: str) -> Peer | Pkm:
    return kind(D, N, HEADS, TOP_K, 8, query_norm=False, operators=choose_operators(name, DEVICE))


def in_bf16(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast(DEVICE, torch.bfloat16):
        return layer(x)


def optimizer_of(layer: Peer | Pkm, name: str) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(layer.expert_tables(), **RATES, fused=True)
    return RowSparseAdamW([{"params": layer.expert_tables(), "row_sparse": True}], **RATES)


def step(layer: Peer | Pkm, optimizer: torch.optim.Optimizer, *parts: Tensor) -> None:
    optimizer.zero_grad()
    for x in parts:
        in_bf16(layer, x).square().sum().backward()
    optimizer.step()


def rounded(numbers: Tensor) -> Tensor:
    return numbers.bfloat16().double()


def expected(layer: Peer | Pkm, x_TD: Tensor, grad_TD: Tensor) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """The output, and the gradients of x, of each table and of the query's weight, from that of the output.

    Every product of a token and a row by itself; only the way from the query to the gates is left to autograd.
    """
    x_TD = x_TD.double().requires_grad_()
    weight, keys = layer.query.weight.detach().double().requires_grad_(), layer.sub_keys[0].detach().double()
    query_THSC = (x_TD @ weight.T + layer.query.bias.detach().double()).view(len(x_TD), HEADS, 2, -1)
    side_THSn = torch.einsum("thsc,snc->thsn", query_THSC, keys)
    scores_THN = (side_THSn[:, :, 0, :, None] + side_THSn[:, :, 1, None, :]).flatten(2)
    best_THK, rows_THK = scores_THN.topk(TOP_K)
    gates_TJ, rows_TJ = best_THK.softmax(-1).flatten(1), rows_THK.flatten(1)
    x16_TD, dy_TD, g_TJ = rounded(x_TD.detach()), rounded(grad_TD), gates_TJ.detach()
    up_TJD = rounded(layer.expert_tables()[-1].detach())[rows_TJ]
    dh_TJ = (dy_TD[:, None] * up_TJD).sum(-1)
    table_gradients, dx16_TD = [], torch.zeros_like(x16_TD)
    if isinstance(layer, Peer):
        down_TJD = rounded(layer.w_down.detach())[rows_TJ]
        s_TJ = (x16_TD[:, None] * down_TJD).sum(-1)
        cdf, density = 0.5 * (1 + torch.erf(s_TJ / 2**0.5)), torch.exp(-s_TJ.square() / 2) / (2 * torch.pi) ** 0.5
        h_TJ, dg_TJ = g_TJ * s_TJ * cdf, dh_TJ * s_TJ * cdf
        ds_TJ = dh_TJ * g_TJ * (cdf + s_TJ * density)
        dx16_TD = rounded((ds_TJ[..., None] * down_TJD).sum(1))
        table_gradients.append(added_by_row(rows_TJ, ds_TJ, x16_TD))
    else:
        h_TJ, dg_TJ = g_TJ, dh_TJ
    table_gradients.append(added_by_row(rows_TJ, h_TJ, dy_TD))
    routed = torch.autograd.grad(gates_TJ, [x_TD, weight], dg_TJ)
    return (h_TJ[..., None] * up_TJD).sum(1), dx16_TD + routed[0], table_gradients, routed[1]


def added_by_row(rows_TJ: Tensor, coefficients_TJ: Tensor, vectors_TD: Tensor) -> Tensor:
    table_ND = vectors_TD.new_zeros(N, D)
    for t, rows in enumerate(rows_TJ.tolist()):
        for j, row in enumerate(rows):
            table_ND[row] += coefficients_TJ[t, j] * vectors_TD[t]
    return table_ND


@pytest.mark.parametrize("name", RUNNABLE)
def test_rows_are_read_in_bf16_and_their_gradients_are_fp32(name, kind):
    layer, totals = make(kind, name), 0.0
    for _ in range(2):  # passes whose gradients add up
        layer.query.weight.grad = None
        x, probe = torch.randn(7, D, requires_grad=True), torch.randn(7, D).bfloat16().float()
        y = in_bf16(layer, x)
        y.backward(probe)
        wanted, dx, table_gradients, d_weight = expected(layer, x.detach(), probe)
        totals += torch.stack(table_gradients)
        assert y.dtype == torch.float32 and torch.equal(y, y.bfloat16().float())
        # Triton's interpreter cuts off where a GPU rounds.
        torch.testing.assert_close(y.double(), wanted, rtol=2**-7 if name == "triton" else 2**-8, atol=1e-6)
        torch.testing.assert_close(x.grad.double(), dx, rtol=2**-7, atol=2**-7 * dx.abs().max().item())
        torch.testing.assert_close(layer.query.weight.grad.double(), d_weight, rtol=1e-4, atol=1e-5)
    for table, total in zip(layer.expert_tables(), totals, strict=True):
        assert table.dtype == table.grad.dtype == torch.float32
        torch.testing.assert_close(table.grad.double(), total, rtol=1e-5, atol=1e-6 * total.abs().max().item())


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("name", RUNNABLE)
def test_updates_too_small_for_bf16_add_up(name, kind, optimizer_name):
    layer, x = make(kind, name), torch.rand(5, D)  # positive, so that no expert is without a gradient
    for table in layer.expert_tables():
        nn.init.ones_(table)
    before = in_bf16(layer, x)
    optimizer = optimizer_of(layer, optimizer_name)
    optimizer.param_groups[0] |= {"lr": 5e-5, "eps": 1e-8, "weight_decay": 0.0}  # bf16 resolves 0.004 below 1
    for _ in range(100):
        optimizer.zero_grad()
        in_bf16(layer, x).sum().backward()
        optimizer.step()
    table = layer.expert_tables()[-1]
    assert {value.dtype for value in (table, *optimizer.state[table].values())} == {torch.float32}
    retrieved = table[layer.retrieve(x)[1].unique()]
    moved = 0.005 * torch.where(retrieved > 1, 1.0, -1.0)  # 100 steps of the same sign and size
    torch.testing.assert_close(retrieved, 1 + moved, rtol=0, atol=5e-5)
    assert not torch.equal(in_bf16(layer, x), before)


def changes(layer: Peer | Pkm, x: Tensor):
    """Everything that may change a table, or where it lies."""
    other = make(type(layer), layer.operators.name)
    for name in OPTIMIZERS:
        yield name, lambda name=name: step(layer, optimizer_of(layer, name), x)
    yield "another checkpoint", lambda: layer.load_state_dict(other.state_dict())
    yield "in place", lambda: [torch.no_grad()(table.mul_)(2) for table in layer.expert_tables()]
    yield "another storage", lambda: [setattr(t, "data", t.detach() + 1) for t in layer.expert_tables()]
    yield "another precision and back", lambda: layer.double().float()
    yield "another parameter", lambda: layer.load_state_dict(other.state_dict(), assign=True)


@pytest.mark.parametrize("name", RUNNABLE)
def test_the_copy_follows_its_table(name, kind):
    layer, x = make(kind, name), torch.randn(5, D)
    for what, change in changes(layer, x):
        with torch.inference_mode():
            in_bf16(layer, x)
        change()
        fresh = make(kind, name)
        fresh.load_state_dict(layer.state_dict())
        assert torch.equal(in_bf16(layer, x), in_bf16(fresh, x)), what


@pytest.mark.parametrize("name", OTHERS)
def test_one_copy_serves_all_passes_of_a_step(name, kind):
    layer, x = make(kind, name), torch.randn(5, D)
    optimizer, table = optimizer_of(layer, "row_sparse_adamw"), layer.expert_tables()[0]
    copies = []
    for _ in range(2):
        in_bf16(layer, x).sum().backward()
        copies.append(layer.operators.rounded(table, torch.bfloat16))
    assert copies[0] is copies[1] and copies[0].dtype == (torch.bfloat16 if name == "triton" else torch.float32)
    optimizer.step()
    assert layer.operators.rounded(table, torch.bfloat16) is not copies[0]
    assert layer.operators.rounded(table, torch.float32).data_ptr() == table.data_ptr(), "fp32 reads the table itself"


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_copy_is_no_part_of_the_model(name, kind):
    layer, x = make(kind, name), torch.randn(5, D)
    names, size = list(layer.state_dict()), len(pickle.dumps(layer))
    y = in_bf16(layer, x)
    assert list(layer.state_dict()) == names and {v.dtype for v in layer.state_dict().values()} == {torch.float32}
    assert len(pickle.dumps(layer)) == size
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.expert_tables()[-1].mul_(2)
    assert torch.equal(in_bf16(layer, x), y) and torch.equal(in_bf16(twin, x), 2 * y)
