"""Steps in micro-batches end with the weights, losses and running statistics of whole ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_cells import budget

from peerscale.config.schema import load
from peerscale.data.store import open_corpus
from peerscale.model.trained import checkpoints
from peerscale.plan.plan import Verdict, plan
from peerscale.records.curves import read_metrics
from peerscale.train.cell import fit
from peerscale.train.checkpoint import StepCheckpoint
from peerscale.train.evaluation import evaluate
from peerscale.train.metrics import MetricsLog
from peerscale.train.module import LanguageModel

STEPS = 4
CPU = torch.device("cpu")
GROUPS = "routing_group_sequences=4"
CASES = {
    "dense": ["ffn=dense"],
    "expert choice": ["ffn=moe", "ffn.n_experts=4", GROUPS],
    "token choice": ["ffn=moe_token_choice", "ffn.load_balance_weight=1", GROUPS],
    "fine-grained": ["ffn=fine_grained_moe", "ffn.load_balance_weight=1", GROUPS],
    "balanced": ["ffn=balanced_moe", "ffn.balance_rate=0.1"],
    "shared values, row-sparse": ["ffn=memory_plus", "replaced=all", "optim=row_sparse_adamw"],
    "pkm": ["ffn=pkm", "ffn.query_bias=false", GROUPS],
    "peer": ["ffn=peer", "ffn.query_bias=false", GROUPS, "replaced=all"],
    "peer without norm": ["ffn=peer", "ffn.query_norm=false"],
    "peer, row-sparse": ["ffn=peer", "ffn.query_bias=false", GROUPS, "optim=row_sparse_adamw"],
}


def trained(
    overrides: list[str], folder: Path, resumed: Path | None = None
) -> tuple[list[dict[str, Any]], list[float], dict[str, Any]]:
    """Metrics, losses of validation sequences, and the checkpoint after the last step, all in float64."""
    config = load([*overrides, "trainer.checkpoint_every_steps=2"])
    planned = plan(config)
    assert planned.verdict is Verdict.OK and planned.steps == STEPS
    module = LanguageModel(config, planned).double()
    folder.mkdir()
    callbacks = [MetricsLog(config, planned, folder), StepCheckpoint(folder, config.trainer, fingerprint="")]
    fit(module, callbacks, None, resumed)
    assert next(path.name for path in checkpoints(folder)) == f"step-{STEPS:09d}.ckpt"
    losses = evaluate(module, open_corpus(config.data), config, CPU)["sequence_losses"]
    rows = [{key: value for key, value in row.items() if key != "tokens_per_s"} for row in read_metrics(folder)]
    return rows, losses, torch.load(checkpoints(folder)[0], weights_only=True)


@pytest.mark.parametrize("case", CASES)
def test_parts_of_a_batch_add_up(case: str, settings: list[str], tmp_path: Path) -> None:
    overrides = [*settings, *CASES[case], "tracking=disabled", "trainer.kernel=reference", "trainer.log_every_steps=2"]
    overrides.append(budget(overrides, STEPS))
    rows, losses, whole = trained(overrides, tmp_path / "1")
    assert [row["step"] for row in rows] == [2, 4]
    for n in (2, 4) if case in ("peer", "token choice") else (4,):
        rows_of_parts, losses_of_parts, parts = trained([*overrides, f"trainer.micro_batches={n}"], tmp_path / str(n))
        for row, row_of_parts in zip(rows, rows_of_parts, strict=True):
            for key, value in row.items():  # usage is counted over all parts, in another order
                counted = key in ("expert_usage", "unevenness")
                assert row_of_parts.pop(key) == pytest.approx(value, rel=1e-6 if counted else 1e-10), key
            assert not row_of_parts
        assert losses_of_parts == pytest.approx(losses, abs=1e-5)
        torch.testing.assert_close(parts["state_dict"], whole["state_dict"], rtol=1e-10, atol=1e-12)


def test_a_cell_goes_on_in_the_same_parts_alone(settings: list[str], tmp_path: Path) -> None:
    overrides = [*settings, "ffn=dense", "tracking=disabled", "trainer.micro_batches=2", "trainer.kernel=reference"]
    overrides.append(budget(overrides, STEPS))
    rows, losses, unbroken = trained(overrides, tmp_path / "unbroken")
    middle = tmp_path / "unbroken" / "step-000000002.ckpt"
    rows_again, losses_again, again = trained(overrides, tmp_path / "again", middle)
    assert losses_again == losses and rows_again[-1] == rows[-1]
    for name, weight in unbroken["state_dict"].items():
        assert torch.equal(again["state_dict"][name], weight)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (
            ["ffn=dense", "trainer.micro_batches=3"],
            "the 16 sequences of a device cannot be divided into trainer.micro_batches 3",
        ),
        (
            ["ffn=peer", "trainer.micro_batches=4"],
            "peer takes statistics over 16 sequences, which trainer.micro_batches 4 splits; "
            "routing_group_sequences may be 4 or a divisor of that",
        ),
        (["ffn=peer", "trainer.micro_batches=4", "routing_group_sequences=4"], ""),
        (["ffn=peer", "ffn.query_norm=false", "trainer.micro_batches=4"], ""),
        (["ffn=moe_token_choice", "ffn.load_balance_weight=0", "trainer.micro_batches=16"], ""),
    ],
)
def test_a_group_of_statistics_is_in_one_part(overrides: list[str], reason: str) -> None:
    assert plan(load([*overrides, "d_model=8", "budget=1e11"])).reason == reason


@pytest.mark.parametrize("case", ["dense", "token choice", "peer"])
def test_what_is_computed_again_is_the_same(case: str, settings: list[str], tmp_path: Path) -> None:
    overrides = [*settings, *CASES[case], "tracking=disabled", "trainer.kernel=torch", "trainer.log_every_steps=2"]
    overrides.append(budget(overrides, STEPS))
    rows, losses, kept = trained(overrides, tmp_path / "kept")
    others, their_losses, again = trained([*overrides, "trainer.activation_checkpointing=true"], tmp_path / "again")
    assert (rows, losses) == (others, their_losses)
    assert all(torch.equal(kept["state_dict"][name], again["state_dict"][name]) for name in kept["state_dict"])
