import itertools

import pytest
import torch

import per_token
from peerscale.layers.modules.product_keys import Pkm
from peerscale.model.usage import ExpertUsage
from peerscale.ops.backends import choose_operators

FORMS = [
    {"shared_keys": shared, "query_norm": norm, "query_bias": bias}
    for shared, norm, bias in itertools.product((True, False), (True, False), (True, False))
]


def make(kernel: str = "reference", **form) -> Pkm:
    torch.manual_seed(0)
    layer = Pkm(6, 25, 2, 4, 6, operators=choose_operators(kernel), **form)
    return per_token.unlike_new(layer)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form.values())))
@pytest.mark.parametrize("kernel", ["torch", "reference"])
def test_is_the_weighted_sum_of_the_best_values_of_all(form: dict, kernel: str) -> None:
    layer = make(kernel=kernel, **form)
    if form["query_norm"]:
        layer.eval()  # else the norm over the batch cancels the query bias, which then has no gradient to compare
        layer.query_norm.running_mean.normal_()
        layer.query_norm.running_var.uniform_(0.5, 2)
    per_token.assert_equal_with_gradients(layer, per_token.pkm, torch.randn(5, 6))


@pytest.mark.parametrize("kernel", ["auto", "torch"])
def test_every_kernel_is_the_same_layer(kernel: str) -> None:
    layer, reference, x = make(kernel=kernel).eval(), make(kernel="reference").eval(), torch.randn(4, 5, 6)
    torch.testing.assert_close(layer(x), per_token.pkm(reference, x.view(-1, 6)).view(x.shape), rtol=1e-4, atol=1e-5)


def test_query_norm_in_training_uses_the_batch() -> None:
    per_token.assert_equal_with_gradients(make(query_bias=False), per_token.pkm, torch.randn(7, 6))


def test_values_depend_on_x_through_the_router_alone() -> None:
    # Twice as large queries without bias and norm retrieve the same values; only their weights change.
    layer, x = make(query_norm=False, query_bias=False).eval(), torch.randn(3, 6)
    for (_, scores, rows), (_, larger, same) in zip(
        per_token.retrieved(layer, x), per_token.retrieved(layer, 2 * x), strict=True
    ):
        assert rows == same
        torch.testing.assert_close(larger, 2 * scores)
    with torch.no_grad():
        layer.values.fill_(1.0)
    torch.testing.assert_close(layer(x), torch.full_like(x, 2.0))  # 2 heads whose weights sum to 1 each


def test_expert_tables_are_the_values() -> None:
    layer = make()
    assert [id(p) for p in layer.expert_tables()] == [id(layer.values)]
    assert layer.values.shape == (25, 6)


def test_usage_can_exceed_the_candidates_and_sums_the_weights() -> None:
    layer, x = make().eval(), torch.randn(200, 6)
    layer.usage = ExpertUsage(25)
    layer(x)
    wanted = torch.zeros(25, dtype=torch.float64)
    for _, scores, rows in per_token.retrieved(layer, x):
        wanted[rows] += per_token.softmax(scores).detach().double()
    torch.testing.assert_close(layer.usage.weight_sums, wanted, rtol=1e-5, atol=1e-5)
    assert (wanted != 0).sum() > 4**2
    assert layer.usage.tokens == 200


@pytest.mark.parametrize(
    "kernel",
    [
        "torch",
        "reference",
    ],
)
def test_every_kernel_weights_values_in_fp32_under_autocast(kernel: str) -> None:
    layer, x = make(kernel=kernel).eval(), torch.randn(8, 6)
    with torch.no_grad():
        layer.values.copy_(layer.values.bfloat16())
    plain = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), plain.bfloat16().float()), "of such values the sum alone is rounded"
