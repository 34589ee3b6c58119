"""A compiled training step is one graph a shape, and computes what the same operators compute without torch.compile."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from peerscale.config.schema import load
from peerscale.ops.cpp_operators import CppOperators
from peerscale.ops.operators import collect_row_gradients, collected_gradients
from peerscale.plan.plan import plan
from peerscale.train.evaluation import attach_usage, detach_usage
from peerscale.train.module import LanguageModel
from peerscale.train.optimizer import build_optimizer

SIZE = ["d_model=16", "context=8", "n_layers=1", "batch_sequences=16", "budget=1e12", "data.vocab_size=300"]
GROUPS = ["trainer.micro_batches=2", "routing_group_sequences=4"]
ROWS = ["ffn.n_experts=64", "ffn.n_heads=2", "ffn.top_k=4", "ffn.query_bias=false"]
CASES = {
    "dense": ["ffn=dense", "trainer.activation_checkpointing=true"],
    "expert choice": ["ffn=moe", "ffn.n_experts=4", *GROUPS],
    "token choice": ["ffn=moe_token_choice"],
    "fine-grained": ["ffn=fine_grained_moe", *GROUPS],
    "pkm": ["ffn=pkm", *ROWS],
    "peer": ["ffn=peer", *ROWS, *GROUPS, "replaced=all", "trainer.kernel=torch"],
    "peer, row-sparse": ["ffn=peer", *ROWS, *GROUPS, "replaced=all", "optim=row_sparse_adamw", "n_layers=2"],
}
SEQUENCES = (8, 16, 24)  # of a micro-batch


def trained(overrides: list[str], compiled: bool) -> tuple[list[Tensor], list[int]]:
    """Losses, the last gradients, weights and buffers of a few steps; how many graphs there were after each."""
    torch.manual_seed(0)
    config = load([*SIZE, *overrides])
    module = LanguageModel(config, plan(config)).double()
    optimizer = build_optimizer(module.groups, config, module.plan)
    compute = module.training_step
    if compiled:
        compute = torch.compile(compute, backend="aot_eager", fullgraph=True)
    results, graphs = [], []
    for step, sequences in enumerate(2 * SEQUENCES):
        optimizer.zero_grad()
        if step % len(SEQUENCES) == 0:
            attach_usage(module)
        for _ in range(2):
            loss = compute(torch.randint(300, (sequences, 9)), 0)["loss"]
            loss.backward()
            results.append(loss.detach())
        results += [torch.tensor(value) for value in detach_usage(module).values()]
        torch.nn.utils.clip_grad_norm_(module.groups.clipped, 1.0)
        optimizer.step()
        graphs.append(counters["stats"]["unique_graphs"])
    for weight in module.parameters():
        collected = collected_gradients(weight)
        assert weight.grad is not None or collected
        results += [weight.grad] if weight.grad is not None else []
        results += [part.pairs.operators.table_gradient(part) for part in collected or []]
    return [*results, *module.state_dict().values()], graphs


@pytest.mark.parametrize("case", CASES)
def test_a_training_step_is_one_graph_with_the_same_result(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counters.clear()
    sorted_pairs, sort_pairs = [], CppOperators.sort_pairs
    monkeypatch.setattr(
        CppOperators, "sort_pairs", lambda self, pairs: sorted_pairs.append(pairs) or sort_pairs(self, pairs)
    )
    expected, _ = trained(CASES[case], compiled=False)
    assert not counters["stats"]
    as_often = len(sorted_pairs)
    found, graphs = trained(CASES[case], compiled=True)
    assert not counters["graph_break"]
    assert len(sorted_pairs) == 2 * as_often, "a layer's two tables share the order of their pairs"
    # Nothing was compiled again for a known shape.
    assert graphs[-1] == graphs[len(SEQUENCES) - 1] <= 2 * len(SEQUENCES)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("case", ["pkm", "peer, row-sparse"])
def test_a_compiled_step_in_bf16_reads_rounded_tables(case: str) -> None:
    torch._dynamo.reset()
    config, results = load([*SIZE, *CASES[case], "trainer.kernel=torch"]), []
    for compiled in (False, True):
        torch.manual_seed(0)
        module = LanguageModel(config, plan(config))
        compute = torch.compile(module.losses, backend="aot_eager", fullgraph=True) if compiled else module.losses
        build_optimizer(module.groups, config, module.plan)  # which decides where the tables' gradients go
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = compute(torch.randint(300, (8, 9)))
        loss.backward()
        parts = [part for table in module.groups.tables for part in collected_gradients(table) or []]
        dense = [table.grad for table in module.groups.tables if table.grad is not None]
        results.append([loss.detach(), *dense, *(part.pairs.operators.table_gradient(part) for part in parts)])
    assert len(results[0]) > 1 and all(gradient.dtype == torch.float32 for gradient in results[1])
    for one, other in zip(*results, strict=True):  # torch compiles backward passes as if they were autocast
        torch.testing.assert_close(one, other, rtol=0, atol=2**-6 * one.abs().max().item())


def test_what_is_collected_is_not_the_memory_of_a_graph() -> None:
    """The graph may write over its own once the operator is done."""
    table, x = torch.nn.Parameter(torch.randn(9, 4)), torch.randn(5, 4)
    rows, grad = torch.randint(9, (5, 3)), torch.randn(5, 3)
    collect_row_gradients(table)
    number = table.collected_number  # type: ignore[attr-defined]
    torch.ops.peerscale.row_operator_backward(grad, x, table.detach(), rows, "torch", number, True)
    expected = torch.zeros(9, 4).index_add(0, rows.flatten(), (grad[:, :, None] * x[:, None]).flatten(0, 1))
    for tensor in (x, rows, grad):
        tensor.zero_()
    [part] = collected_gradients(table) or []
    torch.testing.assert_close(part.pairs.operators.table_gradient(part), expected)


def test_a_process_compiles_every_cell_that_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are: torch compiles one function only so often."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    counters.clear()
    compiled = []
    with torch._dynamo.config.patch(recompile_limit=2):
        for width in (8, 16, 24, 32):
            config = load([*SIZE, "ffn=dense", f"size.d_model={width}", "trainer.compile=true"])
            module = LanguageModel(config, plan(config))
            module.setup("fit")
            module.training_step(torch.randint(300, (8, 9)), 0)
            compiled.append(counters["stats"]["unique_graphs"])
    assert compiled == [1, 2, 3, 4]
