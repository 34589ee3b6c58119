import math
from functools import partial

import pytest
import torch

import per_token
from peerscale.layers.dense import Dense
from peerscale.layers.fine_grained_moe import FineGrainedMoe, FineGrainedMoeConfig
from peerscale.layers.moe import ExpertChoiceMoe, MoeConfig, TokenChoiceMoe
from peerscale.layers.usage import ExpertUsage


def expert_choice(n_experts: int, capacity_factor: float = 1.0, group: int | None = None) -> ExpertChoiceMoe:
    torch.manual_seed(0)
    return ExpertChoiceMoe(5, 20, MoeConfig(n_experts=n_experts, capacity_factor=capacity_factor), group)


def token_choice(
    n_experts: int, top_k: int = 1, d_model: int = 5, d_ff: int = 20, balance: float = 0.0, **options
) -> TokenChoiceMoe:
    torch.manual_seed(0)
    config = MoeConfig(n_experts=n_experts, top_k=top_k, load_balance_weight=balance)
    return TokenChoiceMoe(d_model, d_ff, config, **options)


def fine_grained(n_experts: int, top_k: int, n_shared: int = 1, weight: float = 0.0) -> FineGrainedMoe:
    torch.manual_seed(0)
    config = FineGrainedMoeConfig(
        n_experts=n_experts, top_k=top_k, n_shared=n_shared, granularity=4, load_balance_weight=weight
    )
    return FineGrainedMoe(5, 12, config)


@pytest.mark.parametrize(
    ("sequences", "n_experts", "capacity_factor"), [(6, 3, 1.0), (4, 4, 1.0), (6, 4, 2.0), (8, 2, 0.5), (3, 1, 1.0)]
)
def test_expert_choice_is_every_experts_best_tokens_at_each_position(
    sequences: int, n_experts: int, capacity_factor: float
) -> None:
    layer = expert_choice(n_experts, capacity_factor)
    if n_experts == 1:  # its softmax is the constant 1, so the router has no gradient to compare
        layer.router.requires_grad_(False)
        x = torch.randn(sequences, 3, 5)
        torch.testing.assert_close(layer(x), per_token.expert_choice(layer, x))
    else:
        per_token.assert_equal_with_gradients(layer, per_token.expert_choice, torch.randn(sequences, 3, 5))


@pytest.mark.parametrize("n_groups", [2, 4])
def test_expert_choice_in_groups_is_each_group_by_itself(n_groups: int) -> None:
    layer, x = expert_choice(2, group=8 // n_groups), torch.randn(8, 3, 5)

    def group_by_group(layer: ExpertChoiceMoe, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([per_token.expert_choice(layer, group) for group in x.chunk(n_groups)])

    per_token.assert_equal_with_gradients(layer, group_by_group, x)
    layer.usage = ExpertUsage(2)
    layer(x.double())
    assert layer.usage.tokens == 24


@pytest.mark.parametrize(("n_experts", "top_k"), [(4, 1), (4, 2), (3, 3), (8, 3)])
def test_token_choice_is_every_tokens_best_experts(n_experts: int, top_k: int) -> None:
    per_token.assert_equal_with_gradients(token_choice(n_experts, top_k), per_token.token_choice, torch.randn(11, 5))


@pytest.mark.parametrize(("d_model", "d_ff"), [(8, 16), (8, 18), (5, 20)])
@pytest.mark.parametrize("loads", [[3, 0, 5, 1], [0, 0, 9, 0], [1, 1, 1, 1]])
def test_grouped_experts_are_each_expert_on_its_own_rows(d_model: int, d_ff: int, loads: list[int]) -> None:
    # Widths that torch's grouped product takes and widths that it does not, in the precision that it takes.
    layer = token_choice(4, d_model=d_model, d_ff=d_ff)
    x = torch.randn(sum(loads), d_model, requires_grad=True)
    wanted = torch.cat([per_token.coarse_expert(layer, e, rows) for e, rows in enumerate(x.split(loads))])
    got = layer.experts.grouped(x, torch.tensor(loads))
    torch.testing.assert_close(got, wanted)
    upstream, inputs = torch.randn_like(wanted), [x, layer.experts.up, layer.experts.down]
    for a, b in zip(
        torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(wanted, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("d_model", [5, 8])
def test_grouped_experts_compute_in_the_precision_of_autocast(d_model: int) -> None:
    layer, x = token_choice(3, 2, d_model), torch.randn(7, d_model)
    plain = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.experts.grouped(x, torch.tensor([2, 4, 1])).dtype == torch.bfloat16
        torch.testing.assert_close(layer(x).float(), plain, rtol=0.05, atol=0.05)


def test_token_choice_drops_no_token_when_all_choose_one_expert() -> None:
    layer = token_choice(4)
    x = torch.rand(9, 5) + 0.1
    with torch.no_grad():
        layer.router.weight[:] = -10.0
        layer.router.weight[2] = 10.0
    torch.testing.assert_close(layer(x), torch.stack([per_token.coarse_expert(layer, 2, row) for row in x]))


def test_token_choice_keeps_the_leading_shape_and_takes_no_tokens() -> None:
    layer, x = token_choice(4, 2), torch.randn(2, 3, 5)
    torch.testing.assert_close(layer(x).view(6, 5), layer(x.view(6, 5)))
    assert layer.eval()(torch.zeros(0, 5)).shape == (0, 5)


@pytest.mark.parametrize("make", [expert_choice, token_choice])
def test_one_expert_is_the_dense_layer(make) -> None:
    layer, dense, x = make(1), Dense(5, 20), torch.randn(4, 3, 5)
    with torch.no_grad():
        dense.up.weight.copy_(layer.experts.up[0].T)
        dense.down.weight.copy_(layer.experts.down[0].T)
    torch.testing.assert_close(layer(x), dense(x))


def test_init_weights_draws_the_router_and_scales_what_the_constructor_drew_of_experts() -> None:
    layer = token_choice(8, d_model=64, d_ff=256)
    router, up, down = (weight.clone() for weight in layer.parameters())
    layer.init_weights(0.5)
    assert torch.equal(layer.experts.up, up) and torch.equal(layer.experts.down, 0.5 * down)
    assert not torch.equal(layer.router.weight, router)
    assert layer.router.weight.std().item() == pytest.approx(64**-0.5, rel=0.2)


@pytest.mark.parametrize(
    ("sequences", "n_experts", "capacity_factor"), [(5, 2, 1.0), (2, 4, 1.0), (4, 4, 0.5), (6, 4, 1.0)]
)
def test_expert_choice_refuses_a_capacity_that_is_no_whole_number(
    sequences: int, n_experts: int, capacity_factor: float
) -> None:
    with pytest.raises(ValueError, match=r"experts is not a whole number in 1\.\."):
        expert_choice(n_experts, capacity_factor)(torch.randn(sequences, 2, 5))


def balance_and_z_loss(layer: TokenChoiceMoe, x_TD: torch.Tensor) -> tuple[float, float]:
    """E sum_i f_i P_i (Fedus et al. 2021, equations 4 to 6) and mean(logsumexp^2) (Zoph et al. 2022, equation 5)."""
    n_experts = len(layer.router.weight)
    counts, mass, squares = [0] * n_experts, [0.0] * n_experts, 0.0
    for x in x_TD:
        scores = [math.fsum((row * x).tolist()) for row in layer.router.weight]
        total = math.fsum(math.exp(s) for s in scores)
        for e in sorted(range(n_experts), key=lambda e, s=scores: -s[e])[: layer.top_k]:
            counts[e] += 1
        for e, s in enumerate(scores):
            mass[e] += math.exp(s) / total
        squares += math.log(total) ** 2
    share = [count / sum(counts) for count in counts]
    balance = n_experts * math.fsum(f * p / len(x_TD) for f, p in zip(share, mass, strict=True))
    return balance, squares / len(x_TD)


@pytest.mark.parametrize("top_k", [1, 2])
def test_auxiliary_loss_is_load_balance_and_z_loss(top_k: int) -> None:
    layer, x = token_choice(4, top_k, balance=0.3, z_loss_weight=0.07).double(), torch.randn(13, 5).double()
    layer(x)
    balance, z_loss = balance_and_z_loss(layer, x)
    assert layer.auxiliary_loss.item() == pytest.approx(0.3 * balance + 0.07 * z_loss, rel=1e-6)


@pytest.mark.parametrize("top_k", [1, 3])
def test_fine_grained_auxiliary_loss_is_the_expert_level_balance_loss(top_k: int) -> None:
    """Dai et al. 2024, equations 12 to 14: f_i counts choices times N' / (K' T), and so is E times their share."""
    layer, x = fine_grained(6, top_k, n_shared=2, weight=0.3).double(), torch.randn(13, 5).double()
    layer(x)
    assert layer.auxiliary_loss.item() == pytest.approx(0.3 * balance_and_z_loss(layer, x)[0], rel=1e-6)


def test_auxiliary_loss_of_groups_is_the_mean_of_each_by_itself() -> None:
    x, losses = torch.randn(6, 3, 5), []
    for part, group in ((x, 2), *((part, None) for part in x.split(2))):
        layer = token_choice(4, 2, balance=0.3, z_loss_weight=0.07, group_sequences=group)
        layer(part)
        losses.append(layer.auxiliary_loss)
    torch.testing.assert_close(losses[0], torch.stack(losses[1:]).mean())


def test_auxiliary_loss_trains_the_router_alone_and_only_in_training() -> None:
    layer, x = token_choice(4, balance=1.0, z_loss_weight=1.0), torch.randn(13, 5)
    layer(x)
    layer.auxiliary_loss.backward()
    assert layer.router.weight.grad.abs().max() > 0
    assert layer.experts.up.grad is None
    fresh = token_choice(4, balance=1.0).eval()
    fresh(x)
    assert fresh.auxiliary_loss is None


def test_expert_choice_usage_is_the_gates_of_the_chosen_tokens() -> None:
    layer, x = expert_choice(3), torch.randn(6, 4, 5)
    layer.usage = ExpertUsage(3)
    layer(x)
    wanted = []
    for e in range(3):
        gates = [[per_token.softmax(layer.router.weight @ x[b, t])[e].item() for b in range(6)] for t in range(4)]
        wanted.append(math.fsum(math.fsum(sorted(group)[-2:]) for group in gates))
    assert layer.usage.weight_sums.tolist() == pytest.approx(wanted, rel=1e-5)
    assert layer.usage.tokens == 24


def test_token_choice_usage_is_the_gates_of_the_chosen_experts() -> None:
    layer, x = token_choice(6, 2), torch.randn(7, 5)
    layer.usage = ExpertUsage(6)
    layer(x)
    wanted = [0.0] * 6
    for row in x:
        probability = per_token.softmax(layer.router.weight @ row).tolist()
        for e in sorted(range(6), key=probability.__getitem__)[-2:]:
            wanted[e] += probability[e]
    assert layer.usage.weight_sums.tolist() == pytest.approx(wanted, rel=1e-5)
    assert layer.usage.tokens == 7


@pytest.mark.parametrize("make", [expert_choice, token_choice])
def test_routes_in_fp32_under_autocast(make) -> None:
    # Scores that differ by less than bf16 resolves: rounded, they would tie, and the first expert would win.
    layer = make(2).eval()
    with torch.no_grad():
        layer.router.weight[0], layer.router.weight[1] = 1.0, 1.0 + 1e-4
    layer.usage = ExpertUsage(2)
    x = torch.ones(4, 1, 5)
    plain = layer(x)
    counted, layer.usage = layer.usage.weight_sums, ExpertUsage(2)
    with torch.autocast("cpu", torch.bfloat16):
        routed = layer(x)
    torch.testing.assert_close(layer.usage.weight_sums, counted, rtol=0, atol=0)
    torch.testing.assert_close(routed.float(), plain, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("n_experts", "top_k", "n_shared"), [(6, 1, 1), (6, 3, 1), (4, 4, 2), (9, 2, 3)])
def test_fine_grained_is_the_shared_experts_and_every_tokens_best(n_experts: int, top_k: int, n_shared: int) -> None:
    loop = partial(per_token.fine_grained, n_shared=n_shared)
    per_token.assert_equal_with_gradients(fine_grained(n_experts, top_k, n_shared), loop, torch.randn(11, 5))


def test_fine_grained_gates_of_the_chosen_do_not_sum_to_one() -> None:
    # Equation 10: s itself, so that with equal scores each of the top k weighs 1 / n_experts.
    layer, x = fine_grained(8, 2), torch.randn(3, 5)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.experts.up[:], layer.experts.down[:] = layer.experts.up[0].clone(), layer.experts.down[0].clone()
    routed = 2 / 8 * torch.stack([per_token.coarse_expert(layer, 0, row) for row in x])
    torch.testing.assert_close(layer(x) - layer.shared(x), routed)
