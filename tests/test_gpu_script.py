"""The script for a GPU, rehearsed on the CPU: all calls, each from the archive of the one before."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from peerscale.errors import UserError
from peerscale.files import ROOT
from peerscale.ops.operators import Operators
from peerscale.ops.pairs import Pairs

sys.path.insert(0, str(ROOT / "benchmarks"))

from gpu import correct, run, train
from gpu.machine import Machine
from gpu.results import MOST_TRIES, Case, Clock, OutOfTime, Results, restore, work_off

CPU = Machine("cpu", "torch", True)


@pytest.mark.skipif("REHEARSE" not in os.environ, reason="takes two minutes; REHEARSE=1 runs it, as .ci/run does")
def test_four_calls_each_from_the_archive_of_the_one_before(tmp_path: Path) -> None:
    script, before = [sys.executable, str(ROOT / "benchmarks" / "gpu" / "run.py")], []
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    for call in "1234":
        command = [*script, call, "--rehearse", "--minutes", "20", "--out", str(tmp_path / call), *before]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        before = ["--from", str(tmp_path / call / "gpu.tar.gz")]
    results = Results(tmp_path / "4", CPU.name)
    phases = ("ceilings", "correct", "kernels", "layers", "steps", "resume", "study")
    assert {row["phase"] for row in results.rows.values()} == {*phases}
    assert not [row for row in results.rows.values() if "reason" in row]
    assert {*results.table("steps")["case"].str.split().str[0]} == {*correct.METHODS}
    (resumed,) = results.table("resume").to_dict("records")
    assert resumed["resumed_from_straight"] == resumed["straight_from_straight"] == 0
    assert results.table("study")["done_cells"].tolist() == [4]
    assert "RIGHT" in (tmp_path / "4/report.md").read_text() and (tmp_path / "4/report.png").stat().st_size > 1000
    with pytest.raises(UserError, match="has results already"):
        restore(tmp_path / "3/gpu.tar.gz", tmp_path / "4")


def test_what_goes_wrong_costs_one_case(tmp_path: Path) -> None:
    measured = []

    def case(name: str, error: BaseException | None = None) -> Case:
        def measure() -> dict[str, object]:
            measured.append(name)
            if error:
                raise error
            return {"value": float("inf")}

        return Case("phase", name, {}, measure)

    cases = [case("a"), case("b", torch.OutOfMemoryError("CUDA out of memory.")), case("c", KeyboardInterrupt())]
    with pytest.raises(KeyboardInterrupt):
        work_off(Results(tmp_path, "one"), cases, Clock(60), lambda: None)
    results = Results(tmp_path, "one")
    results.begun["phase: d"] = MOST_TRIES  # whose calls did not outlive it
    work_off(results, [*cases[:2], case("c"), case("d")], Clock(60), lambda: None)
    assert measured == ["a", "b", "c", "c"]
    rows = {row["case"]: row for row in Results(tmp_path, "one").rows.values()}
    assert rows["a"]["value"] == "inf" and "out of memory" in rows["b"]["reason"] and "left out" in rows["d"]["reason"]
    with pytest.raises(UserError, match="another --out"):
        Results(tmp_path, "two")
    with pytest.raises(OutOfTime):
        work_off(results, [case("e")], Clock(0), lambda: None)
    with pytest.raises(OutOfTime):
        train.ended_in_time([sys.executable, "-c", "import time; time.sleep(100)"], Clock(0))


def test_a_wrong_operator_is_found_and_stops_later_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Operators.weighted_row_sum

    def wrong(self: Operators, table_ND: Tensor, pairs: Pairs, weights_TJ: Tensor) -> Tensor:
        y_TD = original(self, table_ND, pairs, weights_TJ)
        return y_TD * (1 + 1e-3) if y_TD.numel() else y_TD

    monkeypatch.setattr(Operators, "weighted_row_sum", wrong)
    cases = [case for case in correct.cases(CPU) if case.name.startswith("T5") and "float32" in case.name]
    results = Results(tmp_path, CPU.name)
    work_off(results, cases, Clock(60), lambda: None)
    assert correct.verdict(results)[1].startswith("WRONG: 1 of 1 cases")
    with pytest.raises(UserError, match="WRONG"):
        run.main(["3", "--rehearse", "--out", str(tmp_path)])
    monkeypatch.setattr(correct, "stamp", lambda: "of later sources")
    assert correct.verdict(results) == (False, "NOT KNOWN: 0 of 9 cases were right")
