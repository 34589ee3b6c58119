"""The workspace's JSON without a server, and workspace and report on a stand-in for one, saved twice."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from synthetic_study import script

from peerscale.errors import exit_code
from peerscale.files import ROOT
from peerscale.runs import read_runs
from peerscale.training import views
from wandb_server import WandbServer

dashboard = script("dashboard")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    cell = tmp_path / "reproduce" / "dense-d12-5e11-s0"
    cell.mkdir(parents=True)
    (cell / "config.yaml").write_text(yaml.safe_dump({"tracking": {"project": "ours", "entity": None}}))
    shutil.copytree(ROOT / "results" / "reproduce", tmp_path / "reproduce" / "study")
    return tmp_path


def call(runs: Path, *options: str) -> int:
    return exit_code(lambda: dashboard.main(["reproduce", "--runs", str(runs), *options]))


def test_without_the_library_it_says_what_to_install(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(views, "ws", None)
    assert call(runs) == 2
    assert ".venv/bin/python -m pip install --editable '.[report]'\n" in capsys.readouterr().err


def test_without_a_server_the_workspace_is_a_file(runs: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("wandb_workspaces")
    assert call(runs) == 0
    assert "not on the server; " in capsys.readouterr().out
    view = json.loads((runs / "reproduce" / "study" / "workspace.json").read_text())
    assert view["project"] == "ours"
    sections = view["spec"]["section"]["panelBankConfig"]["sections"]
    panels = {p["config"]["chartTitle"]: p["config"] for s in sections for p in s["panels"]}
    for title, axis in {"Training loss against FLOPs": "flops", "Training loss against tokens": "tokens"}.items():
        assert panels[title]["xAxis"] == axis
        assert panels[title]["metrics"] == ["train/loss"]
        assert panels[title]["groupBy"] == "ffn.value.method"
    final = panels["Final loss against parameters; colour: budget"]
    assert final["xAxis"] == "config:derived.value.params_total"
    assert (final["yAxis"], final["zAxis"]) == ("summary:validation/loss", "config:budget.value")
    assert panels["Failed and diverged cells"]["metrics"] == ["failed", "diverged"]
    metrics = {metric for panel in panels.values() for metric in panel.get("metrics", [])}
    assert {"train/expert_usage", "train/unevenness", "train/tokens_per_s", "flops_per_s"} <= metrics
    (runset,) = view["spec"]["section"]["runSets"]
    assert [(f["key"]["name"], f["value"]) for f in runset["filters"]["filters"]] == [
        ("group", "reproduce"),
        ("jobType", "train"),
    ]


def test_saved_twice_there_is_one_workspace_and_one_report(wandb_server: WandbServer, runs: Path) -> None:
    pytest.importorskip("wandb_workspaces")
    for _ in range(2):
        assert call(runs, "--save") == 0
    assert sorted(view["type"] for view in wandb_server.views.values()) == ["project-view", "runs"]
    (report,) = [view for view in wandb_server.views.values() if view["type"] == "runs"]
    text = report["spec"]
    for needed in (
        "How to read this",
        "figures/isoflop",
        "isoFLOP curve",
        *(f"{budget:g} FLOPs" for budget in read_runs("results/reproduce")["budget"].unique()),
        "MoE (token choice)",
    ):
        assert needed in text, needed
    assert wandb_server.unknown == []


def test_a_dead_server_leaves_the_file(
    wandb_server: WandbServer, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("wandb_workspaces")
    monkeypatch.setattr(views, "save", lambda *_: (_ for _ in ()).throw(TimeoutError("no answer")))
    assert call(runs, "--save") == 3
    assert "no answer" in capsys.readouterr().err
    assert (runs / "reproduce" / "study" / "workspace.json").is_file()
