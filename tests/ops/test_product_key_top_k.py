"""Product-key retrieval against brute force over all keys."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peerscale.ops.backends import choose_operators
from peerscale.ops.operators import candidate_pairs

FINDERS = ["reference", "cpp"]


def top_k(name: str, query: Tensor, sub_keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return choose_operators(name).product_key_top_k(query, sub_keys, k)


def all_scores(query: Tensor, sub_keys: Tensor) -> Tensor:
    """Scores of all n^2 keys, each made whole by concatenating its two sub-keys: (T, H, n^2)."""
    n_sets, _, n, c = sub_keys.shape
    keys = torch.cat(
        [sub_keys[:, 0, :, None].expand(-1, n, n, c), sub_keys[:, 1, None].expand(-1, n, n, c)], dim=-1
    ).reshape(n_sets, n * n, 2 * c)
    return torch.einsum("thc,hkc->thk", query.flatten(2), keys.expand(query.shape[1], -1, -1))


def assert_top_k(scores: Tensor, rows: Tensor, every: Tensor) -> None:
    """They are the k best of `every` in order, each named once; which ones of equal score is left open."""
    torch.testing.assert_close(scores, every.topk(scores.shape[-1], dim=-1).values)
    torch.testing.assert_close(scores, every.gather(-1, rows))
    assert all(len(set(row)) == len(row) for row in rows.flatten(0, 1).tolist())


@given(data=st.data())
@pytest.mark.parametrize("name", FINDERS)
def test_top_k_equals_brute_force(name, data):
    n = data.draw(st.integers(1, 9), label="n")
    k = data.draw(st.integers(1, n), label="k")
    heads = data.draw(st.integers(1, 3), label="heads")
    n_sets = data.draw(st.sampled_from([1, heads]), label="key sets")
    tokens, c = data.draw(st.integers(1, 4), label="tokens"), data.draw(st.integers(1, 3), label="half a key's width")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32), label="seed"))
    # Whole numbers: many scores are equal, and all are exact.
    query = torch.randint(-3, 4, (tokens, heads, 2, c), generator=generator).double()
    sub_keys = torch.randint(-3, 4, (n_sets, 2, n, c), generator=generator).double()
    assert_top_k(*top_k(name, query, sub_keys, k), all_scores(query, sub_keys))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("n", "k"), [(16, 16), (50, 7), (64, 16), (64, 64), (100, 33), (129, 1), (130, 70), (300, 16)])
@pytest.mark.parametrize("name", FINDERS)
def test_top_k_of_many_keys(name, n, k, shared, dtype):
    torch.manual_seed(n + k)
    query = torch.randn(3, 2, 2, 4, dtype=dtype)
    sub_keys = torch.randn(1 if shared else 2, 2, n, 4, dtype=dtype)
    assert_top_k(*top_k(name, query, sub_keys, k), all_scores(query, sub_keys))


@pytest.mark.parametrize("levels", [1, 2, 40])
@pytest.mark.parametrize("n", [64, 1100])
def test_equal_scores_are_taken_in_a_fixed_order(n, levels, threads):
    """Whatever the number of equal ones, of threads, and of tokens beside the one in question."""
    query = torch.ones(40, 1, 2, 1)
    sub_keys = torch.randint(levels, (1, 2, n, 1)).float()
    scores, rows = top_k("cpp", query, sub_keys, 16)
    assert_top_k(scores, rows, all_scores(query, sub_keys))
    assert (rows == rows[0]).all()
    threads(2)
    again = [top_k("cpp", query[:tokens], sub_keys, 16)[1] for tokens in (1, 17, 40)]
    assert all((other == rows[0]).all() for other in again)


@pytest.mark.parametrize("n", [16, 64, 1100])
def test_rows_of_a_diverged_model_stay_inside_the_table(n):
    query, sub_keys = torch.randn(64, 1, 2, 1), torch.randn(1, 2, n, 1)
    sub_keys[torch.rand_like(sub_keys) < 0.4] = float("nan")
    query[::7], query[1::7], query[2::7] = float("nan"), float("inf"), 0.0
    _, rows = top_k("cpp", query, sub_keys, 16)
    assert rows.min() >= 0 and rows.max() < n * n


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    ("name", "width"), [("reference", 4), *(("cpp", width) for width in (1, 4, 5, 8, 12, 16, 20, 32, 33))]
)
def test_gradients_are_those_of_brute_force(name, width, shared, dtype):
    """Where whole keys take part, of any width, and many queries."""
    torch.manual_seed(width)
    query = torch.randn(700, 2, 2, width, dtype=dtype, requires_grad=True)
    sub_keys = torch.randn(1 if shared else 2, 2, 20, width, dtype=dtype, requires_grad=True)
    scores, rows = top_k(name, query, sub_keys, 9)
    probe = torch.randn(700, 2, 9, dtype=dtype)
    found = torch.autograd.grad((scores * probe).sum(), (query, sub_keys))
    every = all_scores(query, sub_keys)
    assert_top_k(scores, rows, every)
    brute = torch.autograd.grad((every.gather(-1, rows) * probe).sum(), (query, sub_keys))
    for one, other in zip(found, brute, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4 if dtype is torch.float32 else 1e-9, atol=1e-4)


def test_results_do_not_depend_on_the_number_of_threads(threads):
    query, sub_keys = torch.randn(900, 4, 2, 8, requires_grad=True), torch.randn(1, 2, 32, 8, requires_grad=True)
    results = []
    for n in (1, 3):
        threads(n)
        scores, rows = top_k("cpp", query, sub_keys, 8)
        results.append([scores, rows, *torch.autograd.grad(scores.square().sum(), (query, sub_keys))])
    assert all(torch.equal(one, three) for one, three in zip(*results, strict=True))


@pytest.mark.parametrize("name", FINDERS)
def test_no_tokens(name):
    query, sub_keys = torch.zeros(0, 2, 2, 4, requires_grad=True), torch.randn(1, 2, 6, 4, requires_grad=True)
    scores, rows = top_k(name, query, sub_keys, 3)
    assert scores.shape == rows.shape == (0, 2, 3)
    scores.sum().backward()
    assert query.grad is not None and sub_keys.grad is not None and not sub_keys.grad.any()


@given(k=st.integers(1, 64))
def test_candidate_pairs_are_those_with_fewer_than_k_better_or_equal_ones(k):
    pairs = list(zip(*candidate_pairs(k), strict=True))
    assert set(pairs) == {(i, j) for i in range(k) for j in range(k) if (i + 1) * (j + 1) <= k}
    assert len(pairs) == len(set(pairs)) <= k * (1 + math.log(k))
