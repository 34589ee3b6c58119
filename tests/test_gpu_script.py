"""The script for a GPU, rehearsed on the CPU: every phase, breaking off, a wrong operator, and what is archived."""

import json
import os
import subprocess
import sys
import tarfile
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from torch import Tensor

from peerscale.config.schema import load
from peerscale.errors import UserError
from peerscale.files import ROOT
from peerscale.ops.operators import Operators
from peerscale.ops.pairs import Pairs
from peerscale.records.table import read_runs
from peerscale.train import environment
from programs import call

sys.path.insert(0, str(ROOT / "benchmarks"))

from gpu import archive, correct, correct_models, run, studies
from gpu.machine import Machine
from gpu.results import MOST_TRIES, Case, Clock, OutOfTime, Results, work_off

CPU = Machine("cpu", "torch", True)


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a rehearsal of all phases, by a Python that has the package on its path and not installed."""
    folder = tmp_path_factory.mktemp("rehearsal")
    script = [sys.executable, str(ROOT / "benchmarks" / "gpu" / "run.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [*script, "all", "--rehearse", "--out", str(folder), "--minutes", "60"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def rows_of(folder: Path, phase: str) -> list[dict[str, object]]:
    return json.loads((folder / f"{phase}.json").read_text())["rows"]


def test_every_phase_leaves_results(rehearsed: Path) -> None:
    for phase in ("ceilings", "correct", "kernels", "layer", "steps", "resume", "studies"):
        rows = rows_of(rehearsed, phase)
        assert rows
        # Only what compares with a package that need not be there may be missing.
        unexplained = [row for row in rows if "reason" in row and "PEER-pytorch" not in str(row["case"])]
        assert [row for row in unexplained if row["case"] != "same outputs"] == []
    assert correct.verdict(rehearsed)[0]
    assert {row["method"] for row in rows_of(rehearsed, "steps")} == {*correct_models.METHODS}
    assert rows_of(rehearsed, "resume")[0]["same_bits"] is True
    text = (rehearsed / "tables.md").read_text()
    assert "RIGHT" in text and text.count("\n## ") == 8


def test_the_archive_is_taken_by_figures_and_publish(rehearsed: Path, tmp_path: Path) -> None:
    with tarfile.open(rehearsed / "gpu.tar.gz") as packed:
        packed.extractall(tmp_path, filter="data")
    assert (tmp_path / "sweeps" / "gpu.yaml").is_file() and (tmp_path / archive.TABLES / "steps.json").is_file()
    assert not [*tmp_path.rglob("*.ckpt")]
    where = f"gpu --runs {tmp_path / 'runs'} --results {tmp_path / 'results'}"
    for program in ("collect", "figures", "publish"):
        done = call(f"{program} {where}")
        assert done.code == 0, done.err
    runs = read_runs(tmp_path / "results" / "gpu")
    assert len(runs) == 6 and {*runs["status"]} == {"done"}


def test_a_broken_off_phase_goes_on_where_it_was(tmp_path: Path) -> None:
    measured = []

    def case(name: str, broken: bool = False) -> Case:
        def measure() -> dict[str, object]:
            measured.append(name)
            if broken:
                raise KeyboardInterrupt
            return {"value": 1.0}

        return Case(name, {"label": name}, measure)

    with pytest.raises(KeyboardInterrupt):
        work_off(Results(tmp_path, "phase"), [case("a"), case("b", broken=True)], Clock(60), lambda: None)
    work_off(Results(tmp_path, "phase"), [case("a"), case("b")], Clock(60), lambda: None)
    assert measured == ["a", "b", "b"]
    assert rows_of(tmp_path, "phase") == [{"case": name, "label": name, "value": 1.0} for name in "ab"]


def test_a_case_that_ends_the_process_is_left_out_in_the_end(tmp_path: Path) -> None:
    for _ in range(MOST_TRIES):
        Results(tmp_path, "phase").begin("deadly")
    case = Case("deadly", {}, lambda: pytest.fail("measured once more"))
    work_off(Results(tmp_path, "phase"), [case], Clock(60), lambda: None)
    assert "left out" in str(rows_of(tmp_path, "phase")[0]["reason"])


def test_no_memory_is_a_row_and_a_lost_device_ends_the_process(tmp_path: Path) -> None:
    def too_large() -> dict[str, object]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB.")

    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    cases = [Case("large", {"tokens": 5}, too_large), Case("small", {}, lambda: {"value": float("inf")})]
    work_off(Results(tmp_path, "phase"), cases, Clock(60), lambda: None)
    assert rows_of(tmp_path, "phase")[0] == {"case": "large", "tokens": 5, "reason": "out of memory"}
    with pytest.raises(UserError, match="goes on in a new process"):
        work_off(Results(tmp_path, "other"), cases, Clock(60), lost)
    assert len(rows_of(tmp_path, "other")) == 1


def test_a_phase_ends_before_the_time_is_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["ceilings", "steps", "archive", "--anyway", "--rehearse", "--out", str(tmp_path)]
    assert run.main([*words, "--minutes", "0"]) == run.UNFINISHED
    assert capsys.readouterr().out.count("the same command goes on") == 1
    assert (tmp_path / "gpu.tar.gz").is_file() and not (tmp_path / "steps.json").exists()
    words = ["ceilings", "--rehearse", "--out", str(tmp_path)]
    assert run.main(words) == 0
    with pytest.raises(OutOfTime):
        studies.ended_in_time([sys.executable, "-c", "import time; time.sleep(100)"], Clock(0))


def test_a_wrong_operator_is_found_and_stops_later_phases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Operators.weighted_row_sum

    def wrong(self: Operators, table_ND: Tensor, pairs: Pairs, weights_TJ: Tensor) -> Tensor:
        y_TD = original(self, table_ND, pairs, weights_TJ)
        return y_TD * (1 + 1e-3) if y_TD.numel() else y_TD

    monkeypatch.setattr(Operators, "weighted_row_sum", wrong)
    cases = [case for case in correct.cases(CPU) if "operators T5" in case.name and "float32" in case.name]
    work_off(Results(tmp_path, "correct", correct.stamp()), cases, Clock(60), lambda: None)
    (row,) = rows_of(tmp_path, "correct")
    assert {"gelu experts", "weighted rows"} <= {*row["wrong"]}
    right, why = correct.verdict(tmp_path)
    assert not right and why.startswith("WRONG: 1 of 1 cases")
    with pytest.raises(UserError, match="WRONG"):
        run.main(["steps", "archive", "--rehearse", "--out", str(tmp_path)])
    assert (tmp_path / "gpu.tar.gz").is_file() and not (tmp_path / "steps.json").exists()


def test_correctness_of_other_sources_does_not_count(tmp_path: Path) -> None:
    results = Results(tmp_path, "correct", "of earlier sources")
    results.add("operators", {"wrong": []})
    results.finish()
    assert correct.verdict(tmp_path) == (False, "NOT KNOWN: 0 cases were right, and some are to come")


def test_a_package_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(environment, "version", lambda package: version(package) if package == "peerscale" else "2")
    described = environment.describe("torch", torch.device("cpu"), load(["budget=1e12"]).trainer)
    assert described["peerscale"] is None and described["lightning"] == "2"


def test_results_of_another_device_are_refused(tmp_path: Path) -> None:
    Results(tmp_path, "machine").add("machine", {"device": "NVIDIA H100 80GB HBM3", "kernel": "triton"})
    with pytest.raises(UserError, match="another --out"):
        run.main(["ceilings", "--rehearse", "--out", str(tmp_path)])
