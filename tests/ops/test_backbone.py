"""The operators of the backbone against their formulas in float64, gradients included."""

import pytest
import torch
import torch.nn.functional as F

from peerscale.ops.backends import BACKENDS
from peerscale.ops.cross_entropy import linear_cross_entropy

DEVICE = torch.get_default_device().type
# Triton's turn, for the cross-entropy, is in test_triton.
KERNELS = [name for name in ("cpp", "triton", "torch") if BACKENDS[name].obstacle(DEVICE) is None]
TOLERANCE = {torch.float32: {"rtol": 2e-5, "atol": 2e-6}, torch.float64: {"rtol": 1e-9, "atol": 1e-11}}


def gradients(function, *inputs):
    """A function's value, and the gradients of its product with a fixed probe."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    value = function(*inputs)
    probe = torch.sin(torch.arange(value.numel(), dtype=torch.float64)).view(value.shape).to(value.dtype)
    return [value.detach(), *torch.autograd.grad((value * probe).sum(), inputs)]


def assert_same(found, expected, dtype):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 32), (600, 20), (0, 4)])
def test_rms_norm(shape, kernel, dtype):
    x, weight = torch.randn(shape, dtype=dtype), torch.rand(shape[-1], dtype=dtype)
    found = gradients(lambda x, w: BACKENDS[kernel].rms_norm(x, w, 1e-3), x, weight)
    expected = gradients(lambda x, w: x / (x.square().mean(-1, True) + 1e-3).sqrt() * w, x.double(), weight.double())
    assert_same(found, expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", KERNELS)
def test_rotary_turns_pairs_of_queries_and_keys_as_complex_numbers(kernel, dtype):
    B, T, H, C = 2, 5, 3, 4
    qkv = torch.randn(B, T, 3, H, 2 * C, dtype=dtype)
    angles = torch.rand(9, C, dtype=torch.float64)  # of more positions than are asked for
    tables = angles.cos().to(dtype), angles.sin().to(dtype)

    def formula(qkv):
        turned = (
            torch.complex(*qkv[:, :, :2].chunk(2, -1))
            * torch.polar(torch.ones(T, C).double(), angles[:T])[:, None, None]
        )
        return torch.cat([torch.cat([turned.real, turned.imag], -1), qkv[:, :, 2:]], dim=2)

    found = gradients(lambda qkv: BACKENDS[kernel].rotary(qkv, *tables), qkv)
    assert_same(found, gradients(formula, qkv.double()), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 1), (5, 3), (300, 2048), (7, 2**18 + 1)])
def test_cross_entropy_of_a_linear_head(tokens, vocabulary, kernel, dtype):
    x, head = 3 * torch.randn(tokens, 6, dtype=dtype), torch.randn(vocabulary, 6, dtype=dtype)
    targets = torch.randint(vocabulary, (tokens,))
    found = gradients(lambda x, head: linear_cross_entropy(x, head, targets, BACKENDS[kernel])[0], x, head)
    expected = gradients(lambda x, head: F.cross_entropy(x @ head.T, targets), x.double(), head.double())
    assert_same(found, expected, dtype)


@pytest.mark.parametrize("kernel", KERNELS)
def test_cross_entropy_far_from_the_target_and_of_a_diverged_model(kernel):
    logits = torch.tensor([[0.0, 1e4, -1e4], [0.0, float("nan"), 0.0], [0.0, float("inf"), 0.0]])
    losses = BACKENDS[kernel].cross_entropy_(logits, torch.tensor([2, 0, 0]), 1.0)
    assert losses[0] == 2e4 and losses[1:].isnan().all()
    assert logits[0].tolist() == [0.0, 1.0, -1.0]


@pytest.mark.parametrize("kernel", KERNELS)
def test_products_of_the_head_follow_autocast(kernel):
    x, head, targets = torch.randn(50, 16), torch.randn(64, 16), torch.randint(64, (50,))
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(lambda x, head: linear_cross_entropy(x, head, targets, BACKENDS[kernel])[0], x, head)
        expected = gradients(lambda x, head: F.cross_entropy(F.linear(x, head).float(), targets), x, head)
    assert [tensor.dtype for tensor in found] == [torch.float32] * 3
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.002)


@pytest.mark.parametrize("kernel", KERNELS)
def test_losses_of_single_tokens_are_the_same_with_and_without_gradients(kernel):
    x, head, targets = torch.randn(300, 6), torch.randn(2048, 6, requires_grad=True), torch.randint(2048, (300,))
    mean, losses = linear_cross_entropy(x, head, targets, BACKENDS[kernel])
    torch.testing.assert_close(losses, F.cross_entropy(x @ head.T, targets, reduction="none"))
    assert mean == losses.mean() and mean.requires_grad and not losses.requires_grad
    with torch.inference_mode():
        assert torch.equal(linear_cross_entropy(x, head, targets, BACKENDS[kernel])[1], losses)
