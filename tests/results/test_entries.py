"""Whoever enters the standing table: the folder of each entrant in results/standing, and the template to start from."""

import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from peerscale.config.schema import load
from peerscale.errors import UserError
from peerscale.files import ROOT
from peerscale.model.build import build_model
from peerscale.plan.cell import Cell
from peerscale.plan.cost import cost
from peerscale.plan.entrant import Entrant, Losses, Placing, drive, read_entrant
from peerscale.records.entry import ENTRY, STANDING, check_entry, losses_of, read_entries, write_entry
from peerscale.records.record import Status, new_record
from peerscale.records.table import read_records, write_records
from programs import call

TEMPLATE = ROOT / "docs" / "template"
TABLES = {STANDING: [], STANDING.with_name("standing_code"): ["data=code"]}
"""The folders of tables, with the overrides of their cells."""
ENTRIES = sorted(path.parent for standing in TABLES for path in standing.glob(f"*/{ENTRY}"))


@pytest.fixture(autouse=True)
def no_layers_are_left_findable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))


def check_folder(name: str, standing: Path, overrides: Sequence[str] = ()) -> None:
    """Its runs are those of the protocol, its layer can be imported, and its models have the parameters of its cost."""
    assert check_entry(name, overrides, standing) > 0
    (entry,) = (entry for entry in read_entries(standing) if entry.name == name)
    entrant = entry.about["entrant"]
    for chosen in entry.about["chosen"].values():
        settings = [f"++{key}={value}" for key, value in chosen.items()]
        blocks = str(entrant["replaced"]).replace(" ", "")
        config = load([f"ffn={entrant['layer']}", "d_model=48", f"replaced={blocks}", *settings])
        assert sum(p.numel() for p in build_model(config).parameters()) == cost(config).params_total


def check_table(standing: Path, copy: Path) -> None:
    """The table is that of the records, but for the last digits, which depend on the processor's order of sums."""
    shutil.copytree(standing, copy)
    done = call(f"standing --results {copy}")
    assert done.code == 0, done.err
    assert (copy / "table.md").read_text() == (standing / "table.md").read_text()
    found, committed = (pd.read_csv(folder / "table.csv") for folder in (copy, standing))
    pd.testing.assert_frame_equal(found, committed, check_exact=False, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("folder", ENTRIES, ids=lambda folder: f"{folder.parent.name}/{folder.name}")
def test_the_folder_of_an_entrant(folder: Path) -> None:
    check_folder(folder.name, folder.parent, TABLES[folder.parent])


@pytest.mark.parametrize("standing", sorted({path.parent for path in STANDING.parent.glob("standing*/table.csv")}))
def test_the_committed_table(standing: Path, tmp_path: Path) -> None:
    check_table(standing, tmp_path / "standing")


def place(name: str, entrant: Entrant, standing: Path) -> None:
    """The whole protocol at the budget of tuning, with losses of a formula in place of training."""
    placing, ran = Placing(name, entrant), {}

    def run(cells: Sequence[Cell]) -> Losses:
        for cell in cells:
            loss = 4 + math.log(cell.config.d_model / 64) ** 2 + math.log(cell.config.optim.lr_factor / 1.2) ** 2 / 50
            loss += 0.01 * math.sin(cell.config.seed + cell.config.d_model)
            found = {"loss": loss, "se": 0.01, "tokens": 1.0, "bits_per_byte": 1.0, "ppl": math.exp(loss)}
            evaluation = {cell.config.data.val_set: found}
            ran[cell.name] = new_record(cell, Status.DONE, "corpus", evaluation=evaluation)
        return losses_of({cell.name: ran[cell.name] for cell in cells})

    chosen = drive(placing.tuning(), run)
    write_entry(placing, ran, {1e13: drive(placing.row(1e13, chosen), run)}, standing)


def test_the_template_enters_a_table_and_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    standing = tmp_path / "standing"
    place("dense", Entrant(layer="dense", replaced="all", reference=True), standing)
    monkeypatch.syspath_prepend(TEMPLATE)
    monkeypatch.chdir(TEMPLATE)
    entrant = read_entrant("bilinear")
    assert [list(each.values()) for each in entrant.choice] == [[2.667], [4.0]]
    place("bilinear", entrant, standing)
    monkeypatch.chdir(tmp_path)
    sys.path.remove(str(TEMPLATE))
    del sys.modules["bilinear"]
    assert call(f"standing --results {standing}").code == 0
    check_folder("bilinear", standing)
    check_table(standing, tmp_path / "same")
    folder = standing / "bilinear"
    records = read_records(folder)
    row = next(n for n, one in enumerate(records) if "validation" in one.evaluation)
    result = records[row].evaluation["validation"]
    records[row] = replace(records[row], evaluation={"validation": {**result, "loss": result["loss"] - 0.1}})
    write_records(folder, records)
    with pytest.raises(AssertionError):
        check_table(standing, tmp_path / "other")
    about = json.loads((folder / ENTRY).read_text())
    about["chosen"]["1e+13"]["optim.lr_factor"] = 3.9
    (folder / ENTRY).write_text(json.dumps(about))
    with pytest.raises(UserError, match="its runs choose"):
        check_folder("bilinear", standing)
