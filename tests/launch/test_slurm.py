"""Cells on a Slurm cluster: a real one, of one node, that the test starts and stops; skipped where there is none."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from peerscale.errors import UserError
from peerscale.files import ROOT
from peerscale.launch.overview import main as overview
from peerscale.launch.slurm import load_settings, needs, queued, submit
from peerscale.plan.cell import Cell
from peerscale.plan.cells import planned_cells
from peerscale.records.curves import METRICS, read_metrics
from peerscale.records.record import Record, Status, read_record, write_record
from slurm_cluster import ask, missing, one_node_slurm, trainable_study
from toy_study import record_of, write_study


@pytest.fixture
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if reason := missing():
        pytest.skip(reason)
    with one_node_slurm(tmp_path_factory.mktemp("slurm"), kill_wait_s=2):
        yield


def sweep_command(study: Path, *settings: str) -> list[str]:
    """As `make sweep LAUNCHER=slurm` does, but with the jobs held: a test says when they start."""
    held = "slurm.additional_parameters={hold: true}"
    return [sys.executable, "-m", "peerscale.launch", str(study), "--launcher", "slurm", held, *settings]


def slurm_settings(**changed: object) -> dict[str, Any]:
    return load_settings([f"slurm.{key}={json.dumps(value)}" for key, value in changed.items()])


def wait(condition: Callable[[], object], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, ask("squeue", "--array")
        time.sleep(0.1)


def record(cell: Cell) -> Record:
    found = read_record(cell.folder)
    assert found is not None
    return found


def rows(cell: Cell) -> list[dict]:
    return list(read_metrics(cell.folder)) if (cell.folder / METRICS).is_file() else []


def test_a_sweep_is_submitted_once_and_survives_preemption(
    slurm: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    study = trainable_study(tmp_path, steps=1200)  # seconds, so that no cell ends before it is disturbed
    short, preempted, dropped, warned = planned_cells(study)
    assert dropped.plan.verdict == "DROP"
    folder = tmp_path / "runs" / "toy" / "study" / "slurm"

    with pytest.raises(UserError, match=r"^sbatch: Batch job submission failed: Invalid partition"):
        submit([short], slurm_settings(partition="nowhere"))
    command = sweep_command(study, "slurm.timeout_min=20", "slurm.mem_gb=1")
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, result.stderr
    assert "toy: 0 cells queued or running in Slurm, 3 to submit" in result.stdout
    assert "  array 1: 3 jobs of 1 GB, 1 CPUs, 0 GPUs, 20 min\n" in result.stdout
    jobs = json.loads((folder / "jobs.json").read_text())
    assert jobs.keys() == {short.name, preempted.name, warned.name}
    assert jobs[short.name] == "1_2" and {*jobs.values()} == {"1_0", "1_1", "1_2"}, "the shortest is the last"
    asked = ask("squeue", "--noheader", "--array", "--format=%i %l %c %m", "--sort=i").splitlines()
    assert asked == [f"1_{i} 20:00 1 1G" for i in range(3)]
    submit([short, preempted, warned], slurm_settings())
    assert "3 cells queued or running in Slurm, 0 to submit" in capsys.readouterr().out
    assert json.loads((folder / "jobs.json").read_text()) == jobs
    overview(["status", str(study)])
    out = capsys.readouterr().out
    assert "3 queued" in out and f"{short.name} queued: Slurm job 1_2 (JobHeldUser)" in out

    for cell in (preempted, warned):
        ask("scontrol", "release", jobs[cell.name])
    to_disturb = {
        preempted.name: (preempted, ["scontrol", "requeue", jobs[preempted.name]]),  # SIGTERM, then SIGKILL
        warned.name: (warned, ["scancel", "--signal=USR2", jobs[warned.name]]),  # as before the time limit
    }

    def disturb() -> bool:
        for name, (cell, command) in list(to_disturb.items()):
            if rows(cell) and list((cell.folder / "checkpoints").glob("step-*.ckpt")):
                ask(*command)
                del to_disturb[name]
        return not to_disturb

    wait(disturb)
    before = {cell.name: rows(cell)[:1] for cell in (preempted, warned)}
    wait(lambda: "PENDING" in ask("squeue", "--noheader", "--format=%T", f"--jobs={jobs[warned.name]}"))
    overview(["status", str(study)])
    assert f"{warned.name} queued: Slurm job {jobs[warned.name]} (BeginTime)" in capsys.readouterr().out

    from peerscale.train.run import run_cell

    undisturbed = planned_cells(study, [f"trainer.runs_directory={tmp_path / 'undisturbed'}"])
    for cell in undisturbed[1::2]:
        run_cell(cell)
    wait(lambda: {jobs[short.name]} == {*ask("squeue", "--noheader", "--array", "--format=%i").split()})
    for cell, reference in zip((preempted, warned), undisturbed[1::2], strict=True):
        assert record(cell).status is Status.DONE and record(cell).bit_exact
        assert record(cell).sequence_losses == record(reference).sequence_losses
        assert rows(cell)[:1] == before[cell.name], "speeds too: the first steps were not taken again"
        losses, expected = ([(row["step"], row["loss"]) for row in rows(c)] for c in (cell, reference))
        assert losses == expected

    ask("scancel", "1")
    wait(lambda: not ask("squeue", "--noheader"))
    overview(["status", str(study)])
    assert f"{short.name} interrupted: Slurm job 1_2 ended before it began" in capsys.readouterr().out
    corpus = record(preempted).hashed_config["data_fingerprint"]
    write_record(short.folder, record_of(short, Status.FAILED, corpus=corpus, reason="OSError: no space"))
    overview(["status", str(study)])
    out = capsys.readouterr().out
    assert "2 done" in out and "failed: OSError: no space; Slurm job 1_2 ended before it began" in out
    submit([short], slurm_settings())
    out = capsys.readouterr().out
    assert re.search(r"0 cells queued or running in Slurm, 1 to submit\n  array \d+: 1 jobs", out)
    assert int(json.loads((folder / "jobs.json").read_text())[short.name]) > 1


def test_what_a_job_needs_comes_from_the_plans(tmp_path: Path) -> None:
    study = write_study(tmp_path, "{methods: [peer], grid: [{budget: 1e10, d_model: 8}]}")
    (cell,) = planned_cells(study)
    small = {"mem_gb": 4, "cpus_per_task": 1, "gpus_per_node": None}  # 2 GB, 1 for logits and a little
    assert needs([cell]) == small
    big = [f"ffn.n_experts={8192**2}", "trainer.threads=3", "trainer.accelerator=gpu"]
    (other,) = planned_cells(study, big)
    large = {"mem_gb": 32, "cpus_per_task": 4, "gpus_per_node": 1}  # 10^9 parameters: checkpoint 13, weights 4, base 6
    assert needs([other]) == needs([cell, other, cell]) == large
    (both,) = planned_cells(study, [*big, "trainer.devices=2", "trainer.threads=8"])
    assert needs([both]) == {"mem_gb": 64, "cpus_per_task": 16, "gpus_per_node": 2}  # a process for each GPU
    on_eight = needs(planned_cells("isoflop_paper"))
    assert on_eight == {"mem_gb": 512, "cpus_per_task": 32, "gpus_per_node": 8}  # 8 checkpoints of 42 GB


def fake_program(folder: Path, name: str, script: str) -> Path:
    """A folder that holds a program of this name."""
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path.parent


def test_without_slurm_one_line_says_what_to_install(tmp_path: Path) -> None:
    command = sweep_command(write_study(tmp_path))
    nothing = {"PATH": str(tmp_path)}
    result = subprocess.run(command, cwd=ROOT, env=nothing, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: no sbatch here: submit on a login node") and "\n" not in result.stderr[:-1]
    assert "apt-get install slurm-wlm munge" in result.stderr


def test_without_submitit_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"^Slurm jobs need submitit: .*pip install --editable '\.\[slurm\]'$"):
        load_settings()


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ("slurm.partitions=main", r"^conf/slurm.yaml: Key 'partitions' is not in struct"),
        ("+slurm.partitions=main", r"^conf/slurm.yaml: Key 'partitions' is not in struct"),
        ("slurm.timeout_min=null", r"^conf/slurm.yaml: timeout_min must be a number"),
        ("~slurm.partition", r"^conf/slurm.yaml: Key '~slurm' is not in struct"),
        (
            "slurm.mem_gb=much",
            r"^sbatch: invalid literal for int\(\) with base 10: 'much' \(asked for 1 jobs of much GB",
        ),
    ],
)
def test_a_wrong_setting_is_one_line(wrong: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(fake_program(tmp_path, "sbatch", "true")))
    fake_program(tmp_path, "srun", "true")
    with pytest.raises(UserError, match=line):
        submit(planned_cells(write_study(tmp_path))[:1], load_settings([wrong]))


def test_settings_are_the_files_and_what_the_overrides_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(fake_program(tmp_path, "sbatch", "true")))
    usual = load_settings()
    chosen = load_settings(["optim.lr=1", "slurm.setup=[module load python]", "slurm.partition=gpu"], 7)
    assert chosen == usual | {"setup": ["module load python"], "partition": "gpu", "array_parallelism": 7}


def test_a_queue_that_does_not_answer_is_not_an_empty_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}")
    with pytest.raises(UserError, match="jobs is not known"):
        queued(["1_0"])
    fake_program(tmp_path, "squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(UserError, match=r"^squeue: .*Unable to contact"):
        queued(["1_0"])
    fake_program(tmp_path, "squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert queued(["1_0"]) == {}
    fake_program(tmp_path, "squeue", "echo '1_0|RUNNING|node[7]'; echo '1_1|PENDING|(Resources, or|so)'")
    assert queued(["1_0", "1_1"]) == {"1_0": ("RUNNING", "node[7]"), "1_1": ("PENDING", "(Resources, or|so)")}
