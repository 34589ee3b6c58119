"""What the fits take from the folder of a study: its finished runs, by curve."""

import json
from pathlib import Path

import pandas as pd
import pytest

from peerscale.records.study import published
from peerscale.records.table import read_runs
from programs import program as script

fit = script("fit")


def test_a_studys_folder_gives_its_finished_runs_by_curve_without_brackets(tmp_path: Path) -> None:
    cells = {
        "dense-d8": ("dense", "", {}, "done"),
        "dense-d12": ("dense", "", {}, "pending"),
        "dense-d16": ("dense", "", {}, "diverged"),
        "dense-d8-lr_factor=2.0": ("dense", "", {"optim.lr_factor": 2.0}, "done"),
        "moe-d8": ("moe", "", {}, "done"),
        "moe_token_choice-d8": ("moe", "token_choice", {}, "done"),
        "peer-d8": ("peer", "", {}, "done"),
        "peer-d8-n_experts=16384": ("peer", "", {"ffn.n_experts": 16384}, "done"),
        "peer-d8-n_experts=16384-lr_factor=2.0": ("peer", "", {"ffn.n_experts": 16384, "optim.lr_factor": 2.0}, "done"),
    }
    curve_of = {
        "dense-d8": "dense",
        "moe-d8": "moe",
        "moe_token_choice-d8": "moe_token_choice",
        "peer-d8": "peer",
        "peer-d8-n_experts=16384": "peer n_experts=16384",
    }
    runs = pd.DataFrame(
        [
            {"cell": cell, "method": method, "variant": variant, "rate_factor": axes.pop("optim.lr_factor", 1.0),
             "settings": json.dumps(axes) if axes else "",
             "status": status, "val_loss": 4.0 if status == "done" else None}
            for cell, (method, variant, axes, status) in cells.items()
        ]
    )  # fmt: skip
    runs = runs.assign(size="d8", seed=0, budget=1e15, flops_per_token=1.0, convention="x")
    runs.to_csv(tmp_path / "runs.csv", index=False)
    table = fit.read_table(tmp_path, None)
    assert dict(zip(table["cell"], table["method"], strict=True)) == curve_of and len(table) == len(curve_of)
    assert fit.read_table(tmp_path, "method == 'peer'")["cell"].tolist() == ["peer-d8"]


def test_of_a_published_study_the_table_has_its_curves_and_of_one_of_rates_every_rate() -> None:
    study = published("isoflop_cpu").folder
    runs, table = read_runs(study), fit.read_table(study, None)
    assert "peer n_experts=16384" in {*table["method"]} and {*table["status"]} == {"done"}
    assert (runs["rate_factor"] != 1).any() and (table["rate_factor"] == 1).all()
    rates = fit.read_table(published("rates").folder, None)
    assert {*rates["method"]} == {"dense", "moe", "moe_token_choice", "pkm", "peer"}
    assert rates.groupby("method")["lr"].nunique().min() > 3


def test_a_table_whose_methods_pool_several_layers_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study, out = published("isoflop_cpu").folder, tmp_path / "fit.json"
    columns = ["--budget", "budget", "--x", "flops_per_token", "--loss", "val_loss", "--by", "method"]
    columns += ["--bootstrap", "0", "--out", str(out), "--where", "status == 'done'"]
    for table, methods in ((study / "runs.csv", {"dense", "moe", "pkm", "peer"}), (study, set())):
        assert fit.main(["isoflop", str(table), *columns]) == 0
        said = [line for line in capsys.readouterr().out.splitlines() if " pools " in line]
        assert {line.split()[2] for line in said} == methods
        assert [line for line in said if " dense " in line and "'rate_factor'" in line] == said[: bool(methods)]
        assert len(said) == len(json.loads(out.read_text()).get("warnings", ()))
