"""From records to tables and fits: nothing is lost, and nothing is fitted that should not be."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from filelock import FileLock
from synthetic_study import METHODS, SWEEP, WRONG, cells, minimum, records, shared_curvature, write_cells

from peerscale.errors import UserError, exit_code
from peerscale.records.fingerprint import fingerprint
from peerscale.records.record import Record, Status, write_record
from peerscale.records.study import collected
from peerscale.records.study import published as kept
from peerscale.records.table import read_records, runs_table
from peerscale.stats import collection
from peerscale.stats.collection import extrapolated, usual_cells
from peerscale.stats.comparison import compare
from peerscale.stats.curve import Curve
from peerscale.stats.fits import fit_study
from programs import program as script

collect = script("collect")


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests put their own plan in the place of this."""
    monkeypatch.setattr(collection, "planned_cells", collection.planned_cells)


@pytest.fixture
def runs(collected_runs: Path) -> pd.DataFrame:
    return pd.read_csv(collected(SWEEP, collected_runs).runs)


def test_every_planned_cell_has_a_row_in_the_plans_order(runs: pd.DataFrame) -> None:
    assert list(runs["cell"]) == [cell.name for cell in cells()]
    unfinished = runs[runs["status"] != "done"].set_index("cell")["status"]
    assert unfinished.to_dict() == {cell: str(status) for cell, status in WRONG.items()}


def test_a_dropped_cell_says_why_and_what_it_would_have_been(runs: pd.DataFrame) -> None:
    row = runs.set_index("cell").loc["pkm-d8-1e11-s0"]
    planned = next(cell for cell in cells() if cell.name == "pkm-d8-1e11-s0").plan
    assert "epochs" in row["reason"]
    assert row["params_total"] == planned.cost.params_total
    assert row["flops_per_token"] == planned.cost.flops_per_token
    assert pd.isna(row["val_loss"])


def by_cell(some: list[Record]) -> dict[str, Record]:
    return {record.cell: record for record in some}


def test_a_cell_never_run_is_pending() -> None:
    found = by_cell([record for record in records() if record.cell != "peer-d8-1e11-s0"])
    planned, further = collection.with_planned(cells(), found)
    all_records = by_cell(planned)
    assert len(all_records) == len(cells()) and further == []
    assert all_records["peer-d8-1e11-s0"].status is Status.PENDING
    assert all_records["pkm-d8-1e11-s0"].status is Status.DROPPED


def test_a_recorded_cell_outside_the_plan_keeps_its_row_and_is_counted_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cells(tmp_path)
    left_out = ("dense-d8-1e11-s0", "peer-d16-3e11-s0")
    collection.planned_cells = lambda sweep, overrides: [cell for cell in cells() if cell.name not in left_out]
    assert collect.main([SWEEP, "--runs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "synthetic: 48 cells (45 done, 1 failed, 1 dropped, 1 diverged), from" in out
    assert f"2 further cells not in the plan: {', '.join(left_out)}" in out
    table = pd.read_csv(collected(SWEEP, tmp_path).runs)
    assert len(table) == 50 and list(table["cell"])[-2:] == list(left_out)


def test_runs_of_older_code_and_what_guests_move_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cells(tmp_path)
    record = next(record for record in records() if record.cell == "dense-d8-1e11-s0")
    layer = {"class": "peerscale.layers.dense.DenseConfig", "source_sha256": "0" * 64}
    old = replace(record, cell="gated-d8-1e11-s0", method="gated", hashed_config=record.hashed_config | {"ffn": layer})
    monkeypatch.setattr(collection, "code_changed", lambda ffn: ffn.get("source_sha256") == "0" * 64)
    write_record(tmp_path / SWEEP / old.cell, replace(old, fingerprint=fingerprint(old.hashed_config)))
    collection.planned_cells = lambda sweep, overrides: cells()
    fits_of = collection.fits_of
    monkeypatch.setattr(collection, "fits_of", lambda *given: {**fits_of(*given), "guests": ["gated"]})
    assert collect.main([SWEEP, "--runs", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "runs of older code, since the layer's module was changed: gated-d8-1e11-s0" in said.err
    assert "those of gated are in the table, and in the fits of no other method\n" in said.out


def test_cells_of_another_corpus_and_evaluation_set_are_of_other_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told apart by their names, or by what they hold: a further cell of the same name on another text."""

    def moved(record: Record, name: str, axes: dict[str, Any], **hashed: Any) -> Record:
        changed = {**record.hashed_config, **hashed}
        cell = record.cell.replace("-s0", f"{name}-s0")
        return replace(record, cell=cell, axes=axes, hashed_config=changed, fingerprint=fingerprint(changed))

    write_cells(tmp_path)
    done = [record for record in records() if record.status is Status.DONE]
    docs = {"data": "docs"}
    others = [moved(record, "-data=docs", docs, data_fingerprint="e" * 16) for record in done[:9]]
    others.append(moved(done[0], "-batch=3", {"batch_sequences": 3}, data_fingerprint="e" * 16))
    data = {**done[0].hashed_config["data"], "val_set": "speeches"}
    others.append(moved(done[0], "-batch=4", {"batch_sequences": 4}, data=data))
    for record in others:
        write_record(tmp_path / SWEEP / record.cell, record)
    collection.planned_cells = lambda sweep, overrides: cells()
    assert collect.main([SWEEP, "--runs", str(tmp_path)]) == 0
    assert "2 cells of another corpus or evaluation set are left out: " in capsys.readouterr().out
    assert list(pd.read_csv(collected(SWEEP, tmp_path).runs)["cell"]) == [cell.name for cell in cells()]
    before = collected(SWEEP, tmp_path).fits.read_bytes()

    renamed = [replace(cell, axes=docs, name=cell.name.replace("-s0", "-data=docs-s0")) for cell in cells()]
    collection.planned_cells = lambda sweep, overrides: renamed
    assert collect.main([SWEEP, "--runs", str(tmp_path)]) == 0
    of_docs = pd.read_csv(collected(SWEEP, tmp_path, "data=docs").runs)
    assert set(of_docs.loc[of_docs["status"] == "done", "cell"]) == {record.cell for record in others[:9]}
    assert collected(SWEEP, tmp_path).fits.read_bytes() == before


def test_a_method_without_runs_is_refused_before_the_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cells(tmp_path)
    collection.planned_cells = lambda sweep, overrides: cells()
    monkeypatch.delattr(collection, "fits_of")
    assert exit_code(lambda: collect.main([SWEEP, "--runs", str(tmp_path), "--methods", "dense,peerr"])) == 2
    assert capsys.readouterr().err.endswith("; did you mean peer?\n")


def test_an_unreadable_plan_is_noticed_and_stops_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(sweep: str, overrides: list[str]) -> None:
        raise UserError("no sweep file synthetic.yaml")

    collection.planned_cells = broken
    assert collection.with_planned(collection.plan_of(SWEEP, []), by_cell(records())) == (records(), [])
    assert "no sweep file synthetic.yaml" in capsys.readouterr().err


def test_a_running_record_that_no_process_holds_is_interrupted(tmp_path: Path) -> None:
    write_cells(tmp_path)
    for cell in ("dense-d8-1e11-s0", "peer-d16-3e11-s0"):
        record = by_cell(records())[cell]
        write_record(tmp_path / SWEEP / cell, replace(record, status=Status.RUNNING, evaluation={}, timing={}))
    collection.planned_cells = lambda sweep, overrides: cells()
    with FileLock(tmp_path / SWEEP / "dense-d8-1e11-s0" / "lock"):
        assert collect.main([SWEEP, "--runs", str(tmp_path)]) == 0
    status = pd.read_csv(collected(SWEEP, tmp_path).runs).set_index("cell")["status"]
    assert (status["dense-d8-1e11-s0"], status["peer-d16-3e11-s0"]) == ("running", "interrupted")


def test_curves_are_the_metrics_of_each_cell(collected_runs: Path) -> None:
    curves = pd.read_csv(collected(SWEEP, collected_runs).curves)
    assert set(curves["cell"]) == {r.cell for r in records() if r.status is not Status.FAILED}
    lines = (collected_runs / SWEEP / "dense-d16-3e11-s0" / "metrics.jsonl").read_text().splitlines()
    mine = curves[curves["cell"] == "dense-d16-3e11-s0"]
    assert mine["step"].iloc[-1] == json.loads(lines[-1])["step"]
    assert len(mine) <= 50


def differences(fits: dict[str, Any]) -> dict[tuple[float, str, str], dict[str, Any]]:
    return {(e["budget"], d["reference"], d["method"]): d for e in fits["budgets"] for d in e["differences"]}


def test_fits_hold_each_methods_optimum_and_the_differences(collected_runs: Path, runs: pd.DataFrame) -> None:
    fits = json.loads(collected(SWEEP, collected_runs).fits.read_text())
    assert set(fits) >= {"x", "loss", "budgets", "claims", "multipliers", "growth", "laws", "conventions", "rates"}
    found = differences(fits)
    assert len(found) == 2 * 4
    for entry in fits["budgets"]:
        done = runs[(runs["budget"] == entry["budget"]) & (runs["status"] == "done")]
        cells = {name: done[done["cell"].str.startswith(f"{name}-")] for name in METHODS}
        optima = {
            name: minimum(coefficients)
            for name, coefficients in shared_curvature(
                {name: (rows["flops_per_token"], rows["val_loss"]) for name, rows in cells.items()}
            ).items()
        }
        assert [m["name"] for m in entry["methods"]] == list(METHODS)
        for method in entry["methods"]:
            assert (method["x"], method["loss"]) == pytest.approx(optima[method["name"]], rel=1e-6)
            assert len(method["sizes"]) == len(cells[method["name"]])
    for (budget, reference, method), row in found.items():
        losses = {m["name"]: m["loss"] for e in fits["budgets"] if e["budget"] == budget for m in e["methods"]}
        assert row["value"] == pytest.approx(losses[method] - losses[reference], abs=2e-6)  # seven digits
        assert row["low"] < row["value"] < row["high"]
        # Unpaired, the 0.5 nats by which sequences differ would make it 0.5 x 2 x 1.96 x sqrt(2 / 512) > 0.12 wide.
        assert row["sequences_se"] < 0.005 and row["high"] - row["low"] < 0.03


def fitted(some: list[Record]) -> dict[str, Any]:
    return fit_study(runs_table(some), compare(runs_table(some), some))


def test_a_cell_without_sequence_losses_costs_its_budget_only_their_part_of_the_error() -> None:
    some = [replace(r, sequence_losses=[]) if r.cell == "peer-d16-1e11-s0" else r for r in records()]
    found = differences(fitted(some))
    peer = found[1e11, "dense", "peer"]
    assert peer["sequences_se"] is None and peer["fit_se"] > 0 and peer["low"] < peer["value"] < peer["high"]
    assert found[3e11, "dense", "peer"]["sequences_se"] > 0


def test_without_minima_there_are_no_differences() -> None:
    def turned(record: Record) -> Record:
        losses = {**record.evaluation["validation"], "loss": 10 - record.evaluation["validation"]["loss"]}
        return replace(record, evaluation={"validation": losses})

    found = differences(fitted([turned(r) if r.status is Status.DONE else r for r in records()]))
    assert found[3e11, "dense", "pkm"]["note"] == "pkm: curvature; dense: curvature"
    assert all("value" not in row for row in found.values())


def test_variants_of_an_axis_are_compared_with_their_own() -> None:
    def variant(record: Record, value: int, harder: float) -> Record:
        losses = record.evaluation.get("validation")
        worse = {"validation": {**losses, "loss": losses["loss"] + harder}} if losses else {}
        cell = record.cell.replace("-s0", f"-batch_sequences={value}-s0")
        sequences = [loss + harder for loss in record.sequence_losses]
        axes = {"batch_sequences": value}
        return replace(record, cell=cell, axes=axes, evaluation=worse, sequence_losses=sequences)

    some = [r for r in records() if r.method in ("dense", "peer")]
    found = differences(fitted([variant(r, value, harder) for value, harder in ((8, 0.5), (16, 0.0)) for r in some]))
    plain = differences(fitted(some))
    assert len(found) == 2 * len(plain)
    for value in (8, 16):
        for (budget, reference, method), row in plain.items():
            same = found[budget, f"{reference} batch_sequences={value}", f"{method} batch_sequences={value}"]
            assert same["value"] == pytest.approx(row["value"], abs=1e-9)


def test_without_dense_there_is_nothing_to_compare_with_it() -> None:
    assert differences(fitted([r for r in records() if r.method in ("moe", "pkm")])) == {}


def test_a_second_collection_changes_no_byte(collected_runs: Path, tmp_path: Path) -> None:
    shutil.copytree(collected_runs, tmp_path, dirs_exist_ok=True)
    collection.planned_cells = lambda sweep, overrides: cells()
    contents = [{path.name: path.read_bytes() for path in collected(SWEEP, tmp_path).folder.iterdir()}]
    assert collect.main([SWEEP, "--runs", str(tmp_path)]) == 0
    contents.append({path.name: path.read_bytes() for path in collected(SWEEP, tmp_path).folder.iterdir()})
    assert contents[0] == contents[1]
    assert set(contents[0]) == {"runs.csv", "records.jsonl", "sequence_losses.npz", "curves.csv", "fits.json"}


def test_a_wrong_file_of_a_study_is_refused_and_none_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its claims and windows would otherwise be ignored."""
    monkeypatch.setattr("peerscale.config.study_file.ROOT", tmp_path)
    (tmp_path / "sweeps").mkdir()
    text = "sweep: {methods: [dense], grid: [{budget: 1e11, d_model: [8]}], claims: {method: peeer, rivals: [dense]}}"
    (tmp_path / "sweeps" / "mine.yaml").write_text(text)
    rest = (runs_table(records()), [])
    with pytest.raises(UserError, match=r"claims\.method names peeer"):
        collection.fits_of("mine", *rest)
    assert len(collection.fits_of("absent", *rest)["budgets"]) > 0


def test_nothing_to_collect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for sweep, said in (("smoke", "make restore SWEEP=smoke\n"), ("reprduce", "did you mean reproduce?\n")):
        assert exit_code(lambda sweep=sweep: collect.main([sweep, "--runs", str(tmp_path)])) == 2
        error = capsys.readouterr().err
        assert error.endswith(said) and error.count("\n") == 1


def test_records_survive_the_collection(collected_runs: Path) -> None:
    """All of them, but for tracebacks, which name a machine's folders, and the fifth decimal of sequences' losses."""
    by_name = by_cell(read_records(collected(SWEEP, collected_runs).folder))
    assert any(round(loss, 4) != loss for record in records() for loss in record.sequence_losses)
    for record in records():
        losses = [round(loss, 4) for loss in record.sequence_losses]
        published = by_name[record.cell]
        assert published == replace(record, hashed_config=published.hashed_config, sequence_losses=losses, traceback="")
        assert fingerprint(published.hashed_config) == record.fingerprint


@pytest.mark.parametrize("sweep", ["every_block", "settings"])
def test_the_fits_in_results_follow_from_the_records_beside_them(sweep: str, tmp_path: Path) -> None:
    """To seven digits, which no processor changes but where a number lies halfway between two."""
    for name in ("restore", "collect"):
        assert script(name).main([sweep, "--runs", str(tmp_path)]) == 0
    made, published = (json.loads(study.fits.read_text()) for study in (collected(sweep, tmp_path), kept(sweep)))
    numbers = [(a, b) for a, b in zip(leaves(made), leaves(published), strict=True) if isinstance(a, float)]
    assert len(numbers) > 100 and all(a == pytest.approx(b, rel=1.5e-6, abs=1e-12) for a, b in numbers)
    assert all(f"{a:.9g}" == f"{a:.12g}" or a.is_integer() for a, _ in numbers)


def leaves(value: Any) -> list[Any]:
    if isinstance(value, (dict, list)):
        return [leaf for part in (value.values() if isinstance(value, dict) else value) for leaf in leaves(part)]
    return [value]


@pytest.mark.parametrize("all_of_them", [False, True])
def test_own_cells_of_another_configuration_are_left_out(
    all_of_them: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cells(tmp_path)
    for record in records():
        hashed = {**record.hashed_config, "context": 32}
        if all_of_them or record.cell == "dense-d16-3e11-s0":
            other = replace(record, hashed_config=hashed, fingerprint=fingerprint(hashed))
            write_record(tmp_path / SWEEP / record.cell, other)
    collection.planned_cells = lambda sweep, overrides: cells()
    assert collect.main([SWEEP, "--runs", str(tmp_path)]) == 0
    who = f"{len(records())} cells, dense-d8-1e11-s0 among them, have" if all_of_them else "dense-d16-3e11-s0 has"
    said = f"notice: {tmp_path / SWEEP}: {who} another configuration than the plan: context 32 -> 64\n"
    assert said in capsys.readouterr().err
    study = collected(SWEEP, tmp_path)
    status = pd.read_csv(study.runs).set_index("cell")["status"]
    assert (status["dense-d16-3e11-s0"], status["dense-d24-3e11-s0"]) == (
        "pending",
        "pending" if all_of_them else "done",
    )
    assert "dense-d16-3e11-s0" not in set(pd.read_csv(study.curves)["cell"])


def test_rates_of_guests_and_of_bracketed_methods_are_told_to_be_extrapolated() -> None:
    """Their places do not depend on the overrides of the part that is collected."""
    own = {(7e11, Curve("dense")), (2.2e12, Curve("dense"))}
    assert extrapolated(usual_cells("reproduce", ["dense"])) == own
    assert extrapolated(usual_cells("reproduce", ["dense", "swiglu"])) >= {*own, (2.2e12, Curve("swiglu"))}
    assert usual_cells("reproduce", ["dense", "of_another_machine"]) == ()
