"""Records of schema 1, as they were published, become those of schema 2 with the same numbers."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from peerscale.cells import Cell, planned_cells, single_cell
from peerscale.config import composed, to_dict
from peerscale.errors import UserError
from peerscale.runs.convert import axes_of_name, main
from peerscale.runs.record import Status, read_record
from peerscale.runs.study import axes_of
from peerscale.runs.table import read_records, read_runs, runs_table
from toy_study import CORPUS, record_of

NOT_IN_SCHEMA_1 = ("trainer", "tracking", "min_steps", "routing_group_sequences")
OF_OPTIM = ("warmup_steps", "decay_fraction")
OF_DATA = ("directory", "name", "path", "held_out", "train_tokens", "max_epochs")


def as_schema_1(cell: Cell, name: str | None = None) -> dict[str, Any]:
    """The record that schema 1 had of a finished cell."""
    new = json.loads(json.dumps(asdict(record_of(cell, Status.DONE))))
    science = {key: value for key, value in to_dict(cell.config).items() if key not in NOT_IN_SCHEMA_1}
    science["data"] = {key: value for key, value in science["data"].items() if key not in OF_DATA}
    science["optim"] = {key: value for key, value in science["optim"].items() if key not in OF_OPTIM}
    science |= {"data_fingerprint": CORPUS, "recipe_version": 1}
    plan = {**new["plan"], "size": new["size"], "lr": new["lr"], "table_lr": new["table_lr"]}
    gone = ("size", "budget", "seed", "axes", "batch_sequences", "lr", "table_lr", "hashed_config", "layer")
    old = {key: value for key, value in new.items() if key not in gone}
    cell_name = {"cell": name or cell.name}
    return {**old, **cell_name, "schema_version": 1, "fingerprint": "0" * 16, "science": science, "plan": plan}


@pytest.fixture(scope="module")
def cells() -> list[Cell]:
    return [cell for cell in planned_cells("experts") if "65536" in cell.name][:3]


def test_a_record_of_schema_1_is_the_record_that_schema_2_makes(cells: list[Cell], tmp_path: Path) -> None:
    for cell in cells:
        folder = tmp_path / "runs" / "experts" / cell.name
        folder.mkdir(parents=True)
        (folder / "record.json").write_text(json.dumps(as_schema_1(cell)))
    with pytest.raises(UserError, match="schema version 1, of an earlier peerscale; to convert all records: make"):
        read_record(folder)
    assert main([str(tmp_path)]) == 0
    for cell in cells:
        assert read_record(tmp_path / "runs" / "experts" / cell.name) == record_of(cell, Status.DONE)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    assert main([str(tmp_path)]) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")} == before, "once is enough"


def test_a_published_study_of_schema_1_is_the_same_study(cells: list[Cell], tmp_path: Path) -> None:
    lines = [json.dumps(as_schema_1(cell)) for cell in cells]
    (tmp_path / "records.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "runs.csv").write_text("sweep,cell\n")
    assert main([str(tmp_path)]) == 0
    records = [record_of(cell, Status.DONE) for cell in cells]
    assert read_records(tmp_path) == records
    table = read_runs(tmp_path)
    assert list(axes_of(table)) == [cell.axes for cell in cells]
    assert list(table["flops_per_token"]) == list(runs_table(records)["flops_per_token"])


def test_the_axes_of_a_name_are_keys_and_values_of_its_configuration() -> None:
    cell = single_cell(composed(["ffn=peer", "optim=row_sparse_adamw", "optim.lr=1e-05", "replaced=[1,3]"]))
    science = as_schema_1(cell)["science"]
    name = "peer-d32-2e11-optim=row_sparse_adamw-lr=1e-05-replaced=1_3-s0"
    assert axes_of_name(name, science) == {"optim": "row_sparse_adamw", "optim.lr": 1e-05, "replaced": [1, 3]}
    assert axes_of_name("peer-d32-2e11-s0", science) == {}
    with pytest.raises(UserError, match=r"its name has lr=0\.5, but its configuration lr=1e-05"):
        axes_of_name("peer-d32-2e11-lr=0.5-s0", science)


def test_what_is_no_record_stays_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "record.json").write_text("{")
    assert main([str(tmp_path)]) == 0
    assert "the file is left as it is" in capsys.readouterr().err
    assert (tmp_path / "record.json").read_text() == "{"
    with pytest.raises(UserError, match="nosuch is not a folder"):
        main([str(tmp_path / "nosuch")])
