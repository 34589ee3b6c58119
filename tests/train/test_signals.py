"""Signals: told once when they begin, not told of healthy runs, and kept in the record."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peerscale.config.schema import composed, load
from peerscale.data.prepare import prepare
from peerscale.files import ROOT
from peerscale.plan.cells import single_cell
from peerscale.records.record import RECORD, Status, parse_record, read_record
from peerscale.train.signals import Watch


def told(rows: list[dict[str, Any]], *routed: int) -> list[str]:
    watch = Watch(*routed)
    usual = {"loss": 5.0, "tokens_per_s": 1000.0, "usage_tokens": 1024}
    return [text for step, row in enumerate(rows, 1) for text in watch.see({**usual, "step": step, **row}).values()]


def losses(*values: float) -> list[dict[str, Any]]:
    return [{"loss": value} for value in values]


def test_a_loss_spike_is_told_when_it_begins_and_again_after_it_ended() -> None:
    assert told(losses(*[5.0] * 6, 5.29, 5.0)) == []
    assert told(losses(*[5.0] * 6, 5.31, 6.0, 5.0, 5.0, 5.4)) == [
        "step 7: loss spike, 5.310 nats per token after 5.000, the median of the 6 rows before",
        "step 11: loss spike, 5.400 nats per token after 5.000, the median of the 10 rows before",
    ]


def test_a_falling_loss_is_no_spike_and_the_first_row_is_compared_with_nothing() -> None:
    assert told(losses(9.0, 8.0, 7.0, 6.5, 6.0, 6.2, 5.0)) == []


@pytest.mark.parametrize(
    ("n_experts", "per_token", "usage", "tokens", "collapsed"),
    [
        (1024, 128, 0.17, 1024, False),  # the least of any healthy run
        (1024, 128, 0.126, 1024, False),
        (1024, 128, 0.125, 1024, True),  # 128 experts a token: every token chooses the same ones
        (2**20, 128, 0.10, 1024, False),
        (2**20, 128, 0.01, 1024, True),  # 1024 tokens could reach an eighth of a million: 1.25 %
        (2**20, 128, 0.015, 1024, False),
        (8, 1, 0.25, 1024, False),
        (8, 1, 0.125, 1024, True),
        (128, 128, 1.0, 1024, False),  # all are retrieved always
    ],
)
def test_a_router_collapses_below_a_tenth_of_what_the_tokens_could_reach(
    n_experts: int, per_token: int, usage: float, tokens: int, collapsed: bool
) -> None:
    signals = told([{"expert_usage": usage, "usage_tokens": tokens}] * 3, n_experts, per_token)
    assert len(signals) == collapsed
    assert all(f"router collapse, {usage:.2%} of {n_experts} experts used" in text for text in signals)


def test_a_throughput_below_half_is_told_if_it_lasts() -> None:
    fast, slow = [{"tokens_per_s": 1000.0}] * 12, {"tokens_per_s": 499.0}
    assert told([*fast, slow, slow, *fast]) == [], "two rows are a checkpoint or a neighbour"
    assert told([*fast, *[slow] * 6]) == ["step 15: throughput halved, 499 tokens/s after 1000"]
    assert told([*fast, *[{"tokens_per_s": 501.0}] * 6]) == []


def test_a_throughput_is_compared_with_the_median_of_all_rows_but_the_last_five() -> None:
    speeds = np.random.default_rng(0).lognormal(7, 0.8, 400).tolist()
    low = [i >= 14 and np.median(speeds[i - 4 : i + 1]) < 0.5 * np.median(speeds[: i - 4]) for i in range(400)]
    begins = [i + 1 for i in range(1, 400) if low[i] and not low[i - 1]]
    found = [int(text.split()[1].rstrip(":")) for text in told([{"tokens_per_s": speed} for speed in speeds])]
    assert found == begins and len(begins) > 3


def test_published_curves_are_silent() -> None:
    import pandas as pd

    curves = pd.read_csv(ROOT / "results" / "reproduce" / "curves.csv")
    assert {cell: told(losses(*rows["loss"])) for cell, rows in curves.groupby("cell")} == {
        cell: [] for cell in curves["cell"].unique()
    }


def test_signals_come_to_the_record_and_older_records_have_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peerscale.train import signals
    from peerscale.train.cell import train_cell

    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {n} of {n * 7919 % 1000} words" for n in range(6000)))
    overrides = [
        "data=text", f"data.path={text}", "data.vocab_size=300", f"data.directory={tmp_path / 'data'}",
        "data.evaluation.validation=512", "data.max_epochs=100", "d_model=8", "n_layers=2", "context=8",
        f"trainer.runs_directory={tmp_path / 'runs'}", "trainer.log_every_steps=1", "tracking=disabled", "budget=2e7",
        "min_steps=1",
    ]  # fmt: skip
    prepare(load(overrides).data)
    monkeypatch.setattr(signals, "LOSS_JUMP", -100.0)
    cell = single_cell(composed(overrides))
    assert train_cell(cell) is Status.DONE
    record = read_record(cell.folder)
    assert record is not None
    (signal,) = [text for text in record.signals if "loss spike" in text]
    assert signal.startswith("step 2: loss spike, ")
    tree = json.loads((cell.folder / RECORD).read_text())
    del tree["signals"]
    assert parse_record(tree, "older") == replace(record, signals=[])
    assert asdict(record)["signals"] == record.signals
