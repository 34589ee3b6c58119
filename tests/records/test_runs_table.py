import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from peerscale.errors import UserError
from peerscale.files import ROOT
from peerscale.plan.cells import Cell, planned_cells
from peerscale.plan.cost import CONVENTION, cost
from peerscale.records.curves import curves_table, read_metrics, row_line
from peerscale.records.record import Record, Status, planned_record, write_record
from peerscale.records.table import read_records, read_runs, runs_table, write_records
from toy_study import record_of, write_study

COLUMNS = [
    "sweep", "method", "variant", "size", "seed", "budget", "settings", "rate_factor", "flops", "flops_per_token",
    "layer_share", "tokens", "steps", "batch_sequences", "context", "precision", "d_model", "n_layers", "n_heads",
    "vocab_size", "params_total", "params_active", "params_non_embedding", "n_experts", "ffn_heads", "top_k", "d_key",
    "query_norm", "active_experts", "granularity", "capacity_factor", "lr", "table_lr", "optimizer", "kernel",
    "n_threads", "val_loss", "val_loss_se", "val_bits_per_byte", "expert_usage", "unevenness", "usage_tokens",
    "wall_s", "tokens_per_s", "flops_per_s", "status", "reason", "convention", "recipe_version", "git_commit",
]  # fmt: skip
"""Of the design, in its order, but for those that depend on the methods and the evaluation sets."""

SWEEP = "{methods: [dense, moe, moe_token_choice, pkm, peer], grid: [{budget: 1e10, d_model: [8, 12]}], seeds: [0, 1]}"


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> list[Cell]:
    return planned_cells(write_study(tmp_path_factory.mktemp("study"), SWEEP), ["min_steps=1"])


@pytest.fixture(scope="module")
def records(cells: list[Cell]) -> list[Record]:
    """Cells of every fate: done, failed, diverged, running, dropped, pending."""
    fates = [Status.DONE, Status.FAILED, Status.DIVERGED, Status.RUNNING, Status.DONE]
    records = [record_of(cell, fates[i % 5], reason="why" * (i % 5 == 1)) for i, cell in enumerate(cells)]
    return [*records[:-2], *(planned_record(cell) for cell in cells[-2:])]


def test_a_row_for_every_cell_whatever_became_of_it(cells: list[Cell], records: list[Record]) -> None:
    table = runs_table(records)
    assert len(table) == len(cells) == 20
    assert list(table["cell"]) == [cell.name for cell in cells]
    assert list(table["status"]) == [str(record.status) for record in records]
    assert {*table["status"]} == {"done", "failed", "diverged", "running", "pending"}
    assert table["val_loss"].notna().equals(table["status"] == "done")


def test_a_users_text_stands_in_the_table_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "stories.txt").write_text("Once upon a time")
    own = ["min_steps=1", "data=text", f"data.path={tmp_path}/stories.txt"]
    cell = planned_cells(write_study(tmp_path, SWEEP), own)[0]
    for record in (record_of(cell, Status.DONE), planned_record(cell)):
        row = runs_table([record]).iloc[0]
        assert row["data"] == "stories"


def test_columns_are_the_designs_in_its_order(records: list[Record]) -> None:
    table = runs_table(records)
    assert [column for column in table.columns if column in COLUMNS] == COLUMNS
    components = {component for record in records for component in record.flops_per_token}
    others = {"cell", "data", "val_set", "ppl_validation", *(f"flops_{component}" for component in components)}
    assert {*table.columns} - {*COLUMNS} == others


def test_a_row_says_what_its_configuration_and_cost_are(cells: list[Cell]) -> None:
    table = runs_table(
        record_of(cell, Status.DONE, router={"expert_usage": 0.5, "unevenness": 1.25, "usage_tokens": 64})
        for cell in cells
    ).set_index("cell")
    for cell in cells:
        row, config, priced = table.loc[cell.name], cell.config, cost(cell.config)
        assert row["flops_per_token"] == sum(priced.flops.values())
        assert row["flops"] == pytest.approx(row["flops_per_token"] * row["tokens"])
        assert row["tokens"] == row["steps"] * row["batch_sequences"] * row["context"]
        assert row["params_non_embedding"] == row["params_total"] - row["vocab_size"] * row["d_model"]
        assert (row["d_model"], row["n_layers"], row["n_heads"]) == (config.d_model, 4, config.n_heads)
        assert (row["size"], row["seed"], row["budget"]) == (config.size_name, config.seed, 1e10)
        assert (row["val_loss"], row["val_loss_se"], row["ppl_validation"]) == (5.25, 0.125, 190.5)
        assert (row["unevenness"], row["usage_tokens"], row["convention"]) == (1.25, 64, CONVENTION)
        for component in (c.removeprefix("flops_") for c in table if re.fullmatch("flops_(?!per_).*", c)):
            assert row[f"flops_{component}"] == priced.flops.get(component, 0)
    by_method = table.groupby(["method", "variant"]).first()
    peer, pkm = by_method.loc["peer", ""], by_method.loc["pkm", ""]
    assert (peer["n_experts"], peer["ffn_heads"], peer["top_k"], peer["d_key"]) == (4096, 4, 16, 8)
    assert (peer["active_experts"], peer["granularity"]) == (64, 64)  # G = h k (PEER, section 2)
    assert pkm["active_experts"] == 128 and np.isnan(pkm["granularity"])
    choice, token = by_method.loc["moe", ""], by_method.loc["moe", "token_choice"]
    assert (choice["active_experts"], choice["capacity_factor"]) == (2, 2) and np.isnan(choice["top_k"])
    assert (token["active_experts"], token["top_k"]) == (1, 1) and np.isnan(token["capacity_factor"])
    assert by_method.loc["dense", ""][["n_experts", "ffn_heads", "top_k", "d_key", "active_experts"]].isna().all()


def test_a_column_that_only_an_outside_layer_has_is_kept(records: list[Record]) -> None:
    table = runs_table([replace(records[0], layer={"n_gates": 4, "top_k": 2}), *records[1:]])
    assert table["n_gates"].iloc[0] == 4 and table["n_gates"].iloc[1:].isna().all()
    assert table["top_k"].iloc[0] == 2 and [column for column in table.columns if column in COLUMNS] == COLUMNS
    with pytest.raises(UserError, match=f"layer of {records[0].cell} has a column 'lr', which the table of runs has"):
        runs_table([replace(records[0], layer={"lr": 0.1})])


def write_cells(folder: Path, records: list[Record]) -> Path:
    for record in records:
        write_record(folder / record.cell, record)
    return folder


def assert_same_table(got: pd.DataFrame, wanted: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(
        got.sort_values("cell", ignore_index=True),
        wanted.sort_values("cell", ignore_index=True),
        check_dtype=False,
        check_like=True,
    )


def test_reads_every_row_of_a_folder_of_cells(tmp_path: Path, records: list[Record]) -> None:
    folder = write_cells(tmp_path / "toy", records)
    (folder / "study").mkdir()
    (folder / "notes.txt").write_text("no cell")
    left = [replace(r, status=Status.INTERRUPTED) if r.status is Status.RUNNING else r for r in records]
    assert_same_table(read_runs(folder), runs_table(left))


def test_a_folder_that_was_set_aside_is_no_cell(tmp_path: Path, records: list[Record]) -> None:
    folder = write_cells(tmp_path / "toy", records)
    (folder / records[0].cell).rename(folder / f"{records[0].cell}.old")
    assert {*read_runs(folder)["cell"]} == {record.cell for record in records[1:]}


def test_reads_every_row_of_a_published_study(tmp_path: Path, records: list[Record]) -> None:
    losses = [[5.12344, 4.0], [5.0, float("nan")], [7.12345678, 30.0]]
    records = [replace(r, sequence_losses=some) for r, some in zip(records, [*losses, *[[]] * 17], strict=True)]
    write_records(tmp_path, records)
    found = read_records(tmp_path)
    assert [record.cell for record in found] == [record.cell for record in records]
    kept = [[5.1234, 4.0], [], [7.1235, 30.0]]
    assert [record.sequence_losses for record in found] == [*kept, *[[]] * 17]
    assert_same_table(read_runs(tmp_path), runs_table(records))


def test_a_flipped_bit_in_the_losses_is_an_error_or_changes_nothing(tmp_path: Path, records: list[Record]) -> None:
    records = [replace(records[0], sequence_losses=[n / 16 for n in range(200)])]
    write_records(tmp_path, records)
    path, expected = tmp_path / "sequence_losses.npz", read_records(tmp_path)
    whole, refused = path.read_bytes(), 0
    for bit in range(0, 8 * len(whole), 31):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            assert read_records(tmp_path) == expected
        except UserError:
            refused += 1
    assert refused > 30


def test_reads_every_row_and_number_of_a_csv(tmp_path: Path, records: list[Record]) -> None:
    table = runs_table(records)
    table.to_csv(tmp_path / "runs.csv", index=False)
    for path in (tmp_path, tmp_path / "runs.csv", str(tmp_path / "runs.csv")):
        got = read_runs(path)
        assert list(got.columns) == list(table.columns)
        assert list(got["cell"]) == list(table["cell"])
        assert list(got["status"]) == list(table["status"])
        numbers = table.select_dtypes("number")
        np.testing.assert_array_equal(got[numbers.columns].to_numpy(float), numbers.to_numpy(float))


def test_relative_paths_are_of_the_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"no runs in {ROOT}/runs/nosuch: expected cells with a record.json"):
        read_runs("runs/nosuch")
    Path("mine").mkdir()
    with pytest.raises(UserError, match="no runs in mine"):
        read_runs("mine")


def test_a_broken_record_is_named_and_not_left_out(tmp_path: Path, records: list[Record]) -> None:
    folder = write_cells(tmp_path / "toy", records)
    (folder / records[3].cell / "record.json").write_text('{"schema_version": 99}')
    with pytest.raises(UserError, match=rf"{records[3].cell}.*schema version 99"):
        read_runs(folder)


# Curves


def metrics(folder: Path, n: int, torn: str = "") -> list[dict]:
    folder.mkdir(parents=True)
    rows = [
        {"step": 20 * i, "tokens": 20 * i * 1024, "flops": i * 10**9, "loss": 8 / i, "lr": 1e-3, "tokens_per_s": 1e4}
        for i in range(1, n + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)
    return rows


@pytest.mark.parametrize("torn", ["", '{"step": 80, "tok', '{"step": 80, "tokens": 3}, '])
def test_a_torn_last_row_is_left_out(tmp_path: Path, torn: str) -> None:
    rows = metrics(tmp_path / "cell", 3, torn)
    assert list(read_metrics(tmp_path / "cell")) == rows


def test_a_cell_without_metrics_has_no_rows(tmp_path: Path) -> None:
    assert list(read_metrics(tmp_path)) == []
    table = curves_table([tmp_path])
    assert list(table.columns) == ["cell", "step", "tokens", "flops", "loss"] and table.empty


def test_a_number_that_changed_on_disk_is_noticed(tmp_path: Path) -> None:
    row = {"step": 1, "tokens": 2, "flops": 3, "loss": 5.25}
    (tmp_path / "metrics.jsonl").write_text(row_line(row))
    assert list(read_metrics(tmp_path)) == [row]
    (tmp_path / "metrics.jsonl").write_text(row_line(row).replace("5.25", "5.05"))
    with pytest.raises(UserError, match=r"metrics.jsonl:1: not a row of metrics"):
        list(read_metrics(tmp_path))
    (tmp_path / "metrics.jsonl").write_text(row_line(row) + row_line(row).replace("crc", "crb"))
    with pytest.raises(UserError, match=r"metrics.jsonl:2: not a row of metrics"):
        list(read_metrics(tmp_path))


@pytest.mark.parametrize(("n", "points"), [(1, 50), (50, 50), (51, 50), (99, 50), (100, 50), (101, 50), (7, 3), (9, 2)])
def test_curves_are_thinned_by_averaging_runs_of_rows(tmp_path: Path, n: int, points: int) -> None:
    rows = metrics(tmp_path / "cell", n)
    table = curves_table([tmp_path / "cell"], points=points)
    stride = next(s for s in range(1, n + 1) if s * points >= n)
    groups = [rows[max(0, i - stride) : i] for i in range(n, 0, -stride)][::-1]
    assert len(table) == len(groups) <= points
    for (_, point), group in zip(table.iterrows(), groups, strict=True):
        assert (point["step"], point["tokens"], point["flops"]) == (
            group[-1]["step"],
            group[-1]["tokens"],
            group[-1]["flops"],
        )
        assert point["loss"] == pytest.approx(sum(row["loss"] for row in group) / len(group))
    assert table["step"].iloc[-1] == 20 * n


def test_a_row_of_few_steps_counts_for_few(tmp_path: Path) -> None:
    metrics(tmp_path / "cell", 3)
    path = tmp_path / "cell" / "metrics.jsonl"
    *rows, last = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in [*rows, {**last, "step": 45, "loss": 1.0}]))
    losses = [row["loss"] for row in rows]
    assert list(curves_table([tmp_path / "cell"], points=1)["loss"]) == [
        pytest.approx((20 * losses[0] + 20 * losses[1] + 5 * 1.0) / 45)
    ]


def test_curves_of_several_cells_stay_apart(tmp_path: Path) -> None:
    for name, n in (("a", 60), ("b", 10)):
        metrics(tmp_path / name, n)
    (tmp_path / "empty").mkdir()
    table = curves_table([tmp_path / "a", tmp_path / "empty", tmp_path / "b"])
    assert list(table.columns) == ["cell", "step", "tokens", "flops", "loss"]
    assert table.groupby("cell").size().to_dict() == {"a": 30, "b": 10}
    assert list(table.index) == list(range(40))
    assert table.groupby("cell")["step"].max().to_dict() == {"a": 1200, "b": 200}
