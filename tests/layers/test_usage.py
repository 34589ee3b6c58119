import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peerscale.layers.usage import ExpertUsage


def counted(n_experts: int, *passes: tuple[list[int], list[float]]) -> ExpertUsage:
    usage = ExpertUsage(n_experts)
    for experts, weights in passes:
        usage.add(torch.tensor(experts), torch.tensor(weights), tokens=1)
    return usage


def test_the_papers_definition_on_a_toy() -> None:
    usage = counted(4, ([0, 1], [0.75, 0.25]), ([1, 3], [0.5, 0.5]))
    assert usage.weight_sums.tolist() == [0.75, 0.75, 0.0, 0.5]
    assert usage.tokens == 2
    assert usage.usage == 3 / 4
    z = [0.375, 0.375, 0.25]
    assert usage.unevenness == pytest.approx(math.log(4) + sum(p * math.log(p) for p in z))


def test_even_use_and_collapse() -> None:
    assert counted(8, (list(range(8)), [0.125] * 8)).unevenness == pytest.approx(0, abs=1e-12)
    collapsed = counted(8, ([5], [1.0]), ([5], [1.0]))
    assert collapsed.unevenness == pytest.approx(math.log(8))
    assert collapsed.usage == 1 / 8


@given(st.lists(st.lists(st.tuples(st.integers(0, 8), st.floats(0.01, 10)), min_size=1, max_size=6), min_size=1))
def test_any_passes_sum_by_expert(passes: list[list[tuple[int, float]]]) -> None:
    usage = ExpertUsage(9)
    sums = [0.0] * 9
    for chosen in passes:
        usage.add(
            torch.tensor([[i for i, _ in chosen]]), torch.tensor([[w for _, w in chosen]], dtype=torch.float64), 3
        )
        for i, w in chosen:
            sums[i] += w
    total = sum(sums)
    assert usage.weight_sums.tolist() == pytest.approx(sums)
    assert usage.usage == sum(s > 0 for s in sums) / 9
    kl = sum(s / total * math.log(s / total / (1 / 9)) for s in sums if s)
    assert usage.unevenness == pytest.approx(kl, abs=1e-9)
    assert usage.tokens == 3 * len(passes)


def test_keeps_no_graph_of_the_layer() -> None:
    weights = torch.tensor([0.5, 0.5], requires_grad=True)
    usage = ExpertUsage(2)
    usage.add(torch.tensor([0, 1]), weights, 1)
    assert not usage.weight_sums.requires_grad
