"""The report on a stand-in for the server, saved twice."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from peerscale.errors import exit_code
from peerscale.files import ROOT
from peerscale.records.table import read_runs
from programs import program as script
from wandb_server import WandbServer

dashboard = script("dashboard")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    cell = tmp_path / "reproduce" / "dense-d12-5e11-s0"
    cell.mkdir(parents=True)
    (cell / "config.yaml").write_text(yaml.safe_dump({"tracking": {"project": "ours", "entity": None, "id_salt": ""}}))
    shutil.copytree(ROOT / "results" / "reproduce", tmp_path / "reproduce" / "study")
    return tmp_path


def call(runs: Path, *options: str) -> int:
    return exit_code(lambda: dashboard.main(["reproduce", "--runs", str(runs), *options]))


def test_without_the_library_it_says_what_to_install(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(dashboard, "wr", None)
    assert call(runs) == 2
    assert ".venv/bin/python -m pip install --editable '.[report]'\n" in capsys.readouterr().err


def test_saved_twice_there_is_one_report(wandb_server: WandbServer, runs: Path) -> None:
    pytest.importorskip("wandb_workspaces")
    for _ in range(2):
        assert call(runs) == 0
    ((kind, text),) = [(view["type"], view["spec"]) for view in wandb_server.views.values()]
    assert kind == "runs"
    for needed in (
        "How to read this",
        "figures/isoflop",
        "isoFLOP curve",
        *(f"{budget:g} FLOPs" for budget in read_runs("results/reproduce")["budget"].unique()),
        "MoE (token choice)",
    ):
        assert needed in text, needed
    assert wandb_server.unknown == []
    (logged,) = wandb_server.runs.values()
    assert (logged.meta["groupName"], logged.meta["jobType"]) == ("reproduce", "study")
    assert "figures/isoflop" in logged.summary and any("isoflop" in name for name in wandb_server.files)
    grids = [block["metadata"] for block in json.loads(text)["blocks"] if block["type"] == "panel-grid"]
    panels = {
        panel["config"]["chartTitle"]: panel["config"]
        for grid in grids
        for panel in grid["panelBankSectionConfig"]["panels"]
        if "chartTitle" in panel["config"]
    }
    for title, axis in {"Training loss against FLOPs": "flops", "Training loss against tokens": "tokens"}.items():
        assert panels[title]["xAxis"] == axis
        assert panels[title]["metrics"] == ["train/loss"]
        assert panels[title]["groupBy"] == "derived.value.name"
    final = panels["Final loss against parameters; colour: budget"]
    assert final["xAxis"] == "config:derived.value.params_total"
    assert (final["yAxis"], final["zAxis"]) == ("summary:validation/loss", "config:budget.value")
    metrics = {metric for panel in panels.values() for metric in panel.get("metrics", [])}
    assert {"train/expert_usage", "train/unevenness", "train/tokens_per_s"} <= metrics
    (runset,) = grids[-1]["runSets"]
    assert [(f["key"]["name"], f["value"]) for f in runset["filters"]["filters"]] == [
        ("group", "reproduce"),
        ("jobType", "train"),
    ]


def test_a_dead_server_is_one_line(
    wandb_server: WandbServer, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("wandb_workspaces")
    monkeypatch.setattr(dashboard, "save", lambda *_: (_ for _ in ()).throw(TimeoutError("no answer")))
    assert call(runs) == 3
    assert "no answer" in capsys.readouterr().err
