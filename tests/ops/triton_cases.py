"""What is particular to the GPU backend; `test_triton` runs these."""

import copy
import itertools

import pytest
import torch
from test_operators import DEVICE, assert_same, experts, inputs, results

from peerscale.ops.backends import BACKENDS, choose_operators
from peerscale.ops.pairs import Pairs

TRITON, REFERENCE = choose_operators("triton", DEVICE), BACKENDS["reference"]


@pytest.mark.parametrize("D", [1, 64, 65, 300])
def test_every_block_size_gives_the_same(D):
    tensors, rows = inputs((3, D, 5, 20), torch.float64)
    assert_same(experts(TRITON, tensors, rows), experts(REFERENCE, tensors, rows), 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    tensors, rows = inputs((2, 100, 3, 60), dtype)
    actual = experts(TRITON, tensors, rows)
    expected = experts(REFERENCE, [tensor.double() for tensor in tensors], rows)
    assert [tensor.dtype for tensor in actual] == [dtype] * 5
    # One rounding, that of the result, which the interpreter cuts off to bfloat16; the gradients' probe is rounded too.
    eps = torch.finfo(dtype).eps
    rounding = 1.01 if dtype == torch.bfloat16 and DEVICE == "cpu" else 0.51
    torch.testing.assert_close(actual[0].double(), expected[0], rtol=rounding * eps, atol=1e-5)
    assert_same(actual[1:], expected[1:], 2 * eps)


def test_runs_are_those_of_a_loop():
    rows = torch.randint(0, 50, (6, 4))
    runs = TRITON.sort_pairs(Pairs(TRITON, rows, 50))
    starts = runs.starts_R.tolist()
    positions = [runs.order_P[a:b].tolist() for a, b in itertools.pairwise(starts)]
    flat = rows.flatten().tolist()
    expected = [[p for p, row in enumerate(flat) if row == wanted] for wanted in sorted(set(flat))]
    assert positions == expected + [[]] * (24 - len(expected))
    assert runs.tokens_P.tolist() == [p // 4 for p in runs.order_P.tolist()]


def search(operators, top_k, tensors):
    rows = []

    def scores(*tensors):
        found, chosen = operators.product_key_top_k(*tensors, top_k)
        rows.append(chosen)
        return found

    return results(scores, tensors), rows[0]


# Tokens, heads, key sets, sub-keys a side, half a key's width, top k: no whole tiles or powers of two; a key set for
# each head; one sub-key of one number; as many as there are.
@pytest.mark.parametrize(
    ("shape", "dtype", "tolerance"),
    [
        ((3, 2, 1, 70, 40, 6), torch.float32, 3e-6),
        ((1, 1, 1, 1, 1, 1), torch.float32, 3e-6),
        ((1, 1, 1, 20, 17, 20), torch.float32, 3e-6),
        ((5, 2, 2, 33, 7, 5), torch.bfloat16, 2 * 2**-7),
    ],
    ids=str,
)
def test_the_search_equals_the_definition(shape, dtype, tolerance):
    T, H, G, N, C, top_k = shape
    tensors = [torch.randn(T, H, 2, C).to(dtype), torch.randn(G, 2, N, C).to(dtype)]
    found, rows = search(TRITON, top_k, tensors)
    expected, expected_rows = search(REFERENCE, top_k, [tensor.double() for tensor in tensors])
    assert torch.equal(rows, expected_rows) and found[0].dtype == torch.float32
    assert_same(found[:1], expected[:1], 3e-6)
    assert_same(found[1:], expected[1:], tolerance)


def test_the_search_puts_the_lower_of_equal_sub_keys_first_and_hides_no_nan():
    query, sub_keys = torch.ones(3, 1, 2, 4), torch.ones(1, 2, 9, 4)
    query[1] = float("nan")
    scores, rows = TRITON.product_key_top_k(query, sub_keys, 3)
    assert rows[0].tolist() == rows[2].tolist() == [[0, 1, 2]]
    assert scores.isnan().flatten(1).all(1).tolist() == [False, True, False]


@pytest.mark.parametrize(("dtype", "top_k"), [(torch.float64, 3), (torch.float32, 65)])
def test_a_search_that_the_kernel_does_not_take_runs_on_torch(dtype, top_k):
    query, sub_keys = torch.randn(3, 2, 2, 5, dtype=dtype), torch.randn(1, 2, 66, 5, dtype=dtype)
    found, expected = (BACKENDS[name].product_key_top_k(query, sub_keys, top_k) for name in ("triton", "torch"))
    assert found[0].dtype == dtype and all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_cross_entropy_of_half_precision_equals_the_definition():
    logits, targets = (3 * torch.randn(2, 9001)).bfloat16(), torch.randint(9001, (2,))
    expected = logits.double().clone()
    losses = [TRITON.cross_entropy_(logits, targets, 0.3), REFERENCE.cross_entropy_(expected, targets, 0.3)]
    assert losses[0].dtype == torch.float32
    assert_same([losses[0]], [losses[1]], 1e-6)
    assert_same([logits], [expected], 2**-7)


def test_other_devices_run_on_torch():
    (x, w_down, w_up, gates), rows = inputs((6, 4, 8, 4), torch.float32)
    on_meta = [tensor.to("meta") for tensor in (x, w_down, w_up, rows, gates)]
    assert copy.deepcopy(TRITON).single_neuron_experts(*on_meta, "gelu").shape == x.shape
