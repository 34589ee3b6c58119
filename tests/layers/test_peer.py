import itertools

import pytest
import torch

import per_token
from peerscale.layers.modules.product_keys import Peer
from peerscale.model.usage import ExpertUsage
from peerscale.ops.backends import choose_operators

FORMS = [
    {"activation": activation, "score": score, "shared_keys": shared, "query_norm": norm, "query_bias": bias}
    for activation, score, shared, norm, bias in itertools.product(
        ("gelu", "relu"), ("softmax", "sigmoid"), (True, False), (True, False), (True, False)
    )
]


def make(
    seed: int = 0,
    *,
    d_model: int = 6,
    n_experts: int = 16,
    n_heads: int = 3,
    top_k: int = 3,
    kernel: str = "reference",
    **form,
) -> Peer:
    torch.manual_seed(seed)
    layer = Peer(d_model, n_experts, n_heads, top_k, d_key=4, operators=choose_operators(kernel), **form)
    return per_token.unlike_new(layer)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form.values())))
def test_is_the_papers_equations_per_token(form: dict) -> None:
    layer = make(**form)
    if form["query_norm"]:
        # A query bias before a BatchNorm over the batch is cancelled by it: it has no gradient to compare.
        layer.eval()
        layer.query_norm.running_mean.normal_()
        layer.query_norm.running_var.uniform_(0.5, 2)
    per_token.assert_equal_with_gradients(layer, per_token.peer, torch.randn(5, 6))


@pytest.mark.parametrize("kernel", ["torch", "reference"])
def test_query_norm_in_training_uses_the_batch(kernel: str) -> None:
    layer = make(query_bias=False, kernel=kernel)
    per_token.assert_equal_with_gradients(layer, per_token.peer, torch.randn(7, 6))


@pytest.mark.parametrize("kernel", ["auto", "torch"])
def test_every_kernel_is_the_same_layer(kernel: str) -> None:
    layer, reference = make(kernel=kernel).eval(), make(kernel="reference").eval()
    x = torch.randn(4, 5, 6)
    torch.testing.assert_close(layer(x), per_token.peer(reference, x.view(-1, 6)).view(x.shape), rtol=1e-4, atol=1e-5)


def test_keeps_the_leading_shape_of_x() -> None:
    layer, x = make().eval(), torch.randn(2, 3, 4, 6)
    y = layer(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y[1, 2, 3], layer(x[1, 2, 3][None])[0])


def test_parameters_have_the_documented_shapes() -> None:
    shared = {name: tuple(p.shape) for name, p in make().named_parameters()}
    assert shared == {
        "w_down": (16, 6),
        "w_up": (16, 6),
        "sub_keys": (1, 2, 4, 2),
        "query.weight": (12, 6),
        "query.bias": (12,),
        "query_norm.weight": (12,),
        "query_norm.bias": (12,),
    }
    layer = make(shared_keys=False, query_norm=False, query_bias=False)
    own = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert own == {"w_down": (16, 6), "w_up": (16, 6), "sub_keys": (3, 2, 4, 2), "query.weight": (12, 6)}


def test_expert_tables_are_the_two_with_a_row_an_expert() -> None:
    layer = make()
    assert [id(p) for p in layer.expert_tables()] == [id(layer.w_down), id(layer.w_up)]


def test_retrieves_expert_ids_not_positions_among_candidates() -> None:
    # Looked up by its position among the k^2 candidates, no expert beyond the first 4 would ever be used.
    layer = make(n_experts=64, top_k=2).eval()
    layer.usage = ExpertUsage(64)
    layer(torch.randn(500, 6))
    used = layer.usage.weight_sums != 0
    assert used.sum() > 2**2
    assert used[2**2 :].any()
    retrieved = {i for _, _, experts in per_token.retrieved(layer, torch.randn(1, 6)) for i in experts}
    assert retrieved <= set(range(64))


def test_usage_is_the_gates_summed_by_expert() -> None:
    for score in ("softmax", "sigmoid"):
        layer, x = make(score=score).eval(), torch.randn(9, 6)
        layer.usage = ExpertUsage(16)
        layer(x[:4])
        layer(x[4:].view(1, 5, 6))
        wanted = [0.0] * 16
        for _, scores, experts in per_token.retrieved(layer, x):
            gates = per_token.softmax(scores) if score == "softmax" else torch.sigmoid(scores)
            for g, i in zip(gates.tolist(), experts, strict=True):
                wanted[i] += g
        torch.testing.assert_close(layer.usage.weight_sums, torch.tensor(wanted).double(), rtol=1e-5, atol=1e-6)
        assert layer.usage.tokens == 9


def test_one_expert_a_head_is_a_feed_forward_layer() -> None:
    # Equation 8: with k = 1 and softmax every gate is 1, and f(x) = V sigma(W^T x) over the experts of the heads.
    layer, x = make(top_k=1).eval(), torch.randn(6, 6)
    experts: dict[int, list[int]] = {}
    for t, _, (i,) in per_token.retrieved(layer, x):
        experts.setdefault(t, []).append(i)
    for t, chosen in experts.items():
        W, V = layer.w_down[chosen], layer.w_up[chosen]
        torch.testing.assert_close(layer(x)[t], V.T @ per_token.gelu(W @ x[t]))


@pytest.mark.parametrize("kernel", ["torch", "reference"])
def test_retrieves_in_fp32_under_autocast(kernel: str) -> None:
    layer, x = make(kernel=kernel).eval(), torch.randn(8, 6)
    plain, found = layer(x), layer.retrieve(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(*pair) for pair in zip(layer.retrieve(x), found, strict=True))
        torch.testing.assert_close(layer(x), plain, rtol=0, atol=2**-6 * plain.abs().max().item())
        assert layer(x).dtype == torch.float32 and layer(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_experts": 15}, r"n_experts 15 is not a square \(product keys\); nearest: 9, 16"),
        ({"top_k": 5}, "top_k 5 is more than the 4 sub-keys of a side"),
        ({"top_k": 0}, "top_k\n  Input should be greater than 0"),
    ],
)
def test_refuses_what_cannot_be_built(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_refuses_a_key_without_two_halves() -> None:
    with pytest.raises(ValueError, match="d_key 5 is odd"):
        Peer(6, 16, 3, 3, 5)
