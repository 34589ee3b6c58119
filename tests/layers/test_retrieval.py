"""PEER and PKM: the papers' equations token by token, all settings, all backends, and the norm of the queries."""

import itertools

import pytest
import torch
from torch import Tensor, nn

import per_token
from peerscale.layers import Peer, Pkm
from peerscale.layers.product_keys import GroupedBatchNorm, ProductKeyRetrieval
from peerscale.layers.usage import ExpertUsage
from peerscale.ops.backends import choose_operators

LOOPS = {Peer: per_token.peer, Pkm: per_token.pkm}
OF_PEER = [{"activation": a, "score": s} for a, s in itertools.product(("gelu", "relu"), ("softmax", "sigmoid"))]
FORMS = [
    (kind, {**own, "shared_keys": shared, "query_norm": norm, "query_bias": bias})
    for kind, owns in ((Peer, OF_PEER), (Pkm, [{}]))
    for own, shared, norm, bias in itertools.product(owns, (True, False), (True, False), (True, False))
]
BOTH = pytest.mark.parametrize("kind", [Peer, Pkm])


def make(
    kind: type[ProductKeyRetrieval], n_experts: int = 16, top_k: int = 3, kernel: str = "reference", **form
) -> ProductKeyRetrieval:
    torch.manual_seed(0)
    layer = kind(6, n_experts, 3, top_k, d_key=4, operators=choose_operators(kernel), **form)
    return per_token.unlike_new(layer)


@pytest.mark.parametrize("kernel", ["torch", "reference"])
@pytest.mark.parametrize(("kind", "form"), FORMS, ids=lambda part: str(part))
def test_is_the_papers_equations_per_token(kind: type, form: dict, kernel: str) -> None:
    layer = make(kind, kernel=kernel, **form)
    if form["query_norm"]:
        # A query bias before a BatchNorm over the batch is cancelled by it: it has no gradient to compare.
        layer.eval()
        layer.query_norm.running_mean.normal_()
        layer.query_norm.running_var.uniform_(0.5, 2)
    per_token.assert_equal_with_gradients(layer, LOOPS[kind], torch.randn(5, 6))


@BOTH
@pytest.mark.parametrize("kernel", ["torch", "reference"])
def test_query_norm_in_training_uses_the_batch(kind: type, kernel: str) -> None:
    layer = make(kind, query_bias=False, kernel=kernel)
    per_token.assert_equal_with_gradients(layer, LOOPS[kind], torch.randn(7, 6))


@BOTH
@pytest.mark.parametrize("kernel", ["auto", "torch"])
def test_every_kernel_is_the_same_layer_on_inputs_of_any_shape(kind: type, kernel: str) -> None:
    layer, reference, x = make(kind, kernel=kernel).eval(), make(kind).eval(), torch.randn(2, 3, 4, 6)
    y = layer(x)
    torch.testing.assert_close(y, LOOPS[kind](reference, x.view(-1, 6)).view(x.shape), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y[1, 2, 3], layer(x[1, 2, 3][None])[0])


def test_parameters_have_the_documented_shapes_and_the_tables_are_those_with_a_row_per_expert() -> None:
    shared = {name: tuple(p.shape) for name, p in make(Peer).named_parameters()}
    assert shared == {
        "w_down": (16, 6), "w_up": (16, 6), "sub_keys": (1, 2, 4, 2), "query.weight": (12, 6), "query.bias": (12,),
        "query_norm.weight": (12,), "query_norm.bias": (12,),
    }  # fmt: skip
    layer = make(Peer, shared_keys=False, query_norm=False, query_bias=False)
    own = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert own == {"w_down": (16, 6), "w_up": (16, 6), "sub_keys": (3, 2, 4, 2), "query.weight": (12, 6)}
    assert [id(table) for table in layer.expert_tables()] == [id(layer.w_down), id(layer.w_up)]
    assert [table.shape for table in make(Pkm).expert_tables()] == [(16, 6)]


@pytest.mark.parametrize(("kind", "form"), [(Peer, {"score": "softmax"}), (Peer, {"score": "sigmoid"}), (Pkm, {})])
def test_usage_is_the_gates_summed_by_expert(kind: type, form: dict) -> None:
    # Looked up by its position among the k^2 candidates, no expert beyond the first 9 would ever be used.
    layer, x = make(kind, n_experts=64, **form).eval(), torch.randn(200, 6)
    layer.usage = ExpertUsage(64)
    layer(x[:4])
    layer(x[4:].view(2, 98, 6))
    wanted = torch.zeros(64, dtype=torch.float64)
    for _, scores, experts in per_token.retrieved(layer, x):
        gates = torch.sigmoid(scores) if form.get("score") == "sigmoid" else per_token.softmax(scores)
        wanted[experts] += gates.detach().double()
    torch.testing.assert_close(layer.usage.weight_sums, wanted, rtol=1e-5, atol=1e-5)
    assert layer.usage.tokens == 200 and wanted[3**2 :].any() and (wanted != 0).sum() > 3**2


def test_one_expert_a_head_is_a_feed_forward_layer() -> None:
    # Equation 8: with k = 1 and softmax every gate is 1, and f(x) = V sigma(W^T x) over the experts of the heads.
    layer, x = make(Peer, top_k=1).eval(), torch.randn(6, 6)
    experts: dict[int, list[int]] = {}
    for t, _, (i,) in per_token.retrieved(layer, x):
        experts.setdefault(t, []).append(i)
    for t, chosen in experts.items():
        W, V = layer.w_down[chosen], layer.w_up[chosen]
        torch.testing.assert_close(layer(x)[t], V.T @ per_token.gelu(W @ x[t]))


@pytest.mark.parametrize("kernel", ["torch", "reference"])
def test_retrieves_in_fp32_under_autocast(kernel: str) -> None:
    layer, x = make(Peer, kernel=kernel).eval(), torch.randn(8, 6)
    plain, found = layer(x), layer.retrieve(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(*pair) for pair in zip(layer.retrieve(x), found, strict=True))
        torch.testing.assert_close(layer(x), plain, rtol=0, atol=2**-6 * plain.abs().max().item())
        assert layer(x).dtype == torch.float32 and layer(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("kernel", ["torch", "reference"])
def test_weights_values_in_fp32_under_autocast(kernel: str) -> None:
    layer, x = make(Pkm, kernel=kernel).eval(), torch.randn(8, 6)
    with torch.no_grad():
        layer.values.copy_(layer.values.bfloat16())
    plain = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), plain.bfloat16().float()), "of such values the sum alone is rounded"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_experts": 15}, r"n_experts 15 is not a square \(product keys\); nearest: 9, 16"),
        ({"top_k": 5}, "top_k 5 is more than the 4 sub-keys of a side"),
        ({"top_k": 0}, "top_k\n  Input should be greater than 0"),
        ({"d_key": 5}, "d_key 5 is odd"),
    ],
)
def test_refuses_what_cannot_be_built(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Peer(**{"d_model": 6, "n_experts": 16, "n_heads": 3, "top_k": 3, **arguments})


def test_init_weights_keeps_what_the_constructor_drew() -> None:
    layer = Peer(6, 16, 3, 3)
    before = [weight.clone() for weight in layer.parameters()]
    layer.init_weights(0.5)
    assert all(map(torch.equal, before, layer.parameters()))


def test_query_norm_is_torchs_and_of_all_devices_where_torch_makes_it_so() -> None:
    layer = make(Pkm)
    assert type(layer.query_norm) is nn.BatchNorm1d
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(layer).query_norm) is nn.SyncBatchNorm
    grouped = nn.SyncBatchNorm.convert_sync_batchnorm(make(Pkm, group_sequences=2))
    assert type(grouped.query_norm) is GroupedBatchNorm, "each group lies on one device"


@pytest.mark.parametrize("micro_batches", [1, 2, 3])
def test_query_norm_in_groups_is_the_batch_norm_of_each_group(micro_batches: int) -> None:
    """However many inputs make up a batch of 6 groups; after each batch the running statistics move by their mean."""
    torch.manual_seed(0)
    norm, by_group = GroupedBatchNorm(5, micro_batches), [nn.BatchNorm1d(5) for _ in range(6)]
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    for group in by_group:
        group.weight.data.copy_(norm.weight.data)
    for _ in range(2):
        x, probe = torch.randn(6, 4, 5, requires_grad=True), torch.randn(6, 4, 5)
        y = torch.cat([norm(part) for part in x.chunk(micro_batches)])
        wanted = torch.stack([group(part) for group, part in zip(by_group, x, strict=True)])
        torch.testing.assert_close(y, wanted)
        gradients = [torch.autograd.grad((out * probe).sum(), x, retain_graph=True)[0] for out in (y, wanted)]
        torch.testing.assert_close(*gradients)
        for name in ("running_mean", "running_var"):
            mean = torch.stack([getattr(group, name) for group in by_group]).mean(0)
            torch.testing.assert_close(getattr(norm, name), mean)
    plain = nn.BatchNorm1d(5).eval()
    plain.load_state_dict(norm.state_dict())
    torch.testing.assert_close(norm.eval()(x).flatten(0, 1), plain(x.flatten(0, 1)))


def groups_by_themselves(layer: ProductKeyRetrieval, x_BTD: Tensor) -> Tensor:
    return torch.stack([per_token.pkm(layer, group.flatten(0, 1)) for group in x_BTD.split(2)]).view(x_BTD.shape)


def test_a_layer_normalises_the_queries_of_each_group_of_sequences() -> None:
    layer = make(Pkm, group_sequences=2, query_bias=False)
    per_token.assert_equal_with_gradients(layer, groups_by_themselves, torch.randn(6, 3, 6))
