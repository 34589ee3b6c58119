import math
from functools import partial

import pytest
import torch

import per_token
from peerscale.layers.fine_grained_moe import FineGrainedMoe, FineGrainedMoeConfig
from peerscale.layers.moe import MoeConfig, TokenChoiceMoe
from peerscale.layers.usage import ExpertUsage


def fine_grained(n_experts: int, top_k: int, n_shared: int = 1, weight: float = 0.0) -> FineGrainedMoe:
    torch.manual_seed(0)
    config = FineGrainedMoeConfig(
        n_experts=n_experts, top_k=top_k, n_shared=n_shared, granularity=4, load_balance_weight=weight
    )
    return FineGrainedMoe(5, 12, config)


@pytest.mark.parametrize(("n_experts", "top_k", "n_shared"), [(6, 1, 1), (6, 3, 1), (4, 4, 2), (9, 2, 3)])
def test_is_the_shared_experts_and_every_tokens_best(n_experts: int, top_k: int, n_shared: int) -> None:
    loop = partial(per_token.fine_grained, n_shared=n_shared)
    per_token.assert_equal_with_gradients(fine_grained(n_experts, top_k, n_shared), loop, torch.randn(11, 5))


def test_the_gates_of_the_chosen_do_not_sum_to_one() -> None:
    # Equation 10: s itself, so that with equal scores each of the top k weighs 1 / n_experts.
    layer, x = fine_grained(8, 2), torch.randn(3, 5)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.experts.down[:], layer.experts.up[:] = layer.experts.down[0].clone(), layer.experts.up[0].clone()
    routed = 2 / 8 * torch.stack([per_token.coarse_expert(layer, 0, row) for row in x])
    torch.testing.assert_close(layer(x) - layer.shared(x), routed)


def test_without_its_shared_expert_is_token_choice() -> None:
    layer, plain, x = fine_grained(6, 2), TokenChoiceMoe(5, 3, MoeConfig(n_experts=6, top_k=2)), torch.randn(2, 4, 5)
    plain.load_state_dict({name: value for name, value in layer.state_dict().items() if "shared" not in name})
    torch.nn.init.zeros_(layer.shared.up.weight)
    torch.testing.assert_close(layer(x), plain(x))


@pytest.mark.parametrize("top_k", [1, 3])
def test_auxiliary_loss_is_the_expert_level_balance_loss(top_k: int) -> None:
    layer, x = fine_grained(6, top_k, n_shared=2, weight=0.3).double(), torch.randn(13, 5).double()
    layer(x)
    scores = [[math.fsum((row * token).tolist()) for row in layer.router.weight] for token in x]
    affinity = [[math.exp(s) / math.fsum(map(math.exp, token)) for s in token] for token in scores]
    selected = [sorted(range(6), key=token.__getitem__)[-top_k:] for token in affinity]
    loss = 0.0
    for i in range(6):
        f = 6 / (top_k * 13) * sum(i in chosen for chosen in selected)  # equation 13, N' = 6, K' = top_k, T = 13
        p = math.fsum(token[i] for token in affinity) / 13  # equation 14
        loss += 0.3 * f * p  # equation 12
    assert layer.auxiliary_loss.item() == pytest.approx(loss, rel=1e-6)


def test_usage_counts_the_routed_experts_alone() -> None:
    layer, x = fine_grained(6, 2, n_shared=2), torch.randn(7, 5)
    layer.usage = ExpertUsage(layer.n_experts)
    layer(x)
    assert len(layer.usage.weight_sums) == 6 and layer.usage.tokens == 7
    assert int((layer.usage.weight_sums > 0).sum()) > 2
