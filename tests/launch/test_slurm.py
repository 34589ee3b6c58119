"""Cells on a Slurm cluster: a real one, of one node, that the test starts and stops; skipped where there is none."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from peerscale.errors import UserError
from peerscale.files import ROOT
from peerscale.launch.overview import main as overview
from peerscale.launch.slurm import SlurmConfig, load_settings, queued, resources
from peerscale.launch.submission import submission_settings
from peerscale.launch.submission import submit as submit_cells
from peerscale.plan.cells import Cell, planned_cells
from peerscale.records.curves import METRICS, read_metrics
from peerscale.records.record import Record, Status, read_record, write_record
from slurm_cluster import ask, missing, one_node_slurm, trainable_study
from toy_study import record_of, write_study

DEFAULTS = {
    **dict.fromkeys(("partition", "account", "qos", "constraint", "additional_parameters")),
    **dict.fromkeys(("cpus_per_task", "gpus_per_node", "mem_gb", "timeout_min")),
    **{"array_parallelism": 256, "time_factor": 3.0, "max_timeout_min": 1440, "signal_delay_s": 120},
    **{"max_num_timeout": 100, "setup": []},
}


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


def slurm_settings(**changed: object) -> SlurmConfig:
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
        submit_cells([short], slurm_settings(partition="nowhere"))
    # The factor puts the long cells in a class of their own: 2 minutes + factor x seconds / 60 are 10 between the two.
    factor = 480 / ((short.estimate_s + min(preempted.estimate_s, warned.estimate_s)) / 2)
    command = sweep_command(study, f"slurm.time_factor={factor:.4f}", "slurm.mem_gb=1")
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, result.stderr
    assert "toy: 0 cells queued or running in Slurm, 3 to submit" in result.stdout
    assert "  job 1: 2 x 1 CPU, 1 GB, 20 min\n  job 2: 1 x 1 CPU, 1 GB, 10 min\n" in result.stdout
    jobs = json.loads((folder / "jobs.json").read_text())
    assert jobs == {preempted.name: "1_0", warned.name: "1_1", short.name: "2"} or jobs == {
        **{preempted.name: "1_1", warned.name: "1_0", short.name: "2"}
    }
    asked = ask("squeue", "--noheader", "--array", "--format=%i %l %c %m", "--sort=i").splitlines()
    assert asked == ["1_0 20:00 1 1G", "1_1 20:00 1 1G", "2 10:00 1 1G"]
    submit_cells([short, preempted, warned], slurm_settings())
    assert "3 cells queued or running in Slurm, 0 to submit" in capsys.readouterr().out
    assert json.loads((folder / "jobs.json").read_text()) == jobs
    overview(["status", str(study)])
    out = capsys.readouterr().out
    assert "3 queued" in out and f"{short.name} queued: Slurm job 2 (JobHeldUser)" in out

    ask("scontrol", "release", "1")
    to_disturb = {
        preempted.name: (preempted, ["scontrol", "requeue", jobs[preempted.name]]),  # SIGTERM, then SIGKILL
        warned.name: (warned, ["scancel", "--signal=USR2", jobs[warned.name]]),  # as before the time limit
    }

    def disturb() -> bool:
        for name, (cell, command) in list(to_disturb.items()):
            if rows(cell):
                ask(*command)
                del to_disturb[name]
        return not to_disturb

    wait(disturb)
    for cell in (preempted, warned):
        wait(lambda cell=cell: list((cell.folder / "checkpoints").glob("step-*.ckpt")))
    before = {cell.name: rows(cell)[:1] for cell in (preempted, warned)}
    wait(lambda: "PENDING" in ask("squeue", "--noheader", "--format=%T", f"--jobs={jobs[warned.name]}"))
    overview(["status", str(study)])
    assert f"{warned.name} queued: Slurm job {jobs[warned.name]} (BeginTime)" in capsys.readouterr().out

    from peerscale.train.run import run_cell

    undisturbed = planned_cells(study, [f"trainer.runs_directory={tmp_path / 'undisturbed'}"])
    for cell in undisturbed[1::2]:
        run_cell(cell)
    wait(lambda: not ask("squeue", "--noheader", "--jobs=1"))
    for cell, reference in zip((preempted, warned), undisturbed[1::2], strict=True):
        assert record(cell).status is Status.DONE and record(cell).bit_exact
        assert record(cell).sequence_losses == record(reference).sequence_losses
        assert rows(cell)[:1] == before[cell.name], "speeds too: the first steps were not taken again"
        losses, expected = ([(row["step"], row["loss"]) for row in rows(c)] for c in (cell, reference))
        assert losses == expected

    ask("scancel", "2")
    wait(lambda: not ask("squeue", "--noheader"))
    overview(["status", str(study)])
    log = folder / "2_0_log.err"
    assert f"{short.name} interrupted: Slurm job 2 has ended, see {log}" in capsys.readouterr().out
    corpus = record(preempted).hashed_config["data_fingerprint"]
    write_record(short.folder, record_of(short, Status.FAILED, corpus=corpus, reason="OSError: no space"))
    overview(["status", str(study)])
    out = capsys.readouterr().out
    assert "2 done" in out and f"failed: OSError: no space; Slurm job 2 has ended, see {log}" in out
    submit_cells([short], slurm_settings())
    assert re.search(r"0 cells queued or running in Slurm, 1 to submit\n  job \d+: 1 x", capsys.readouterr().out)
    assert int(json.loads((folder / "jobs.json").read_text())[short.name]) > 2


def test_a_class_of_resources_comes_from_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    monkeypatch.setenv("PATH", f"{fake_program(tmp_path, 'sbatch', 'true')}:/usr/bin:/bin")
    cell = planned_cells(write_study(tmp_path))[0]
    times = {0: 10, 159: 10, 161: 20, 900: 80, 24 * 3600: 1440}  # 2 + 3 t / 60 minutes, up to 10, 20, 40 ... a day
    for seconds, minutes in times.items():
        assert resources([replace(cell, estimate_s=seconds)], slurm_settings()).time_min == minutes
    small = resources([cell], slurm_settings())
    assert (small.mem_gb, small.cpus, small.gpus) == (4, 1, 0)  # 2 GB and a little, up to a power of two
    trainer = replace(cell.config.trainer, threads=3, accelerator="gpu")
    big = replace(cell.plan, cost=replace(cell.plan.cost, params={"table": 10**9}))
    other = resources([replace(cell, config=replace(cell.config, trainer=trainer), plan=big)], slurm_settings())
    assert (other.mem_gb, other.cpus, other.gpus) == (64, 3, 1)  # 32 GB of state and 2 GB
    shared = replace(cell.config, trainer=replace(trainer, devices=2))
    both = resources([replace(cell, config=shared, plan=big)], slurm_settings())
    assert (both.mem_gb, both.cpus, both.gpus) == (128, 6, 2)  # twice as much: a process for each GPU
    said = {"timeout_min": 7, "mem_gb": 1.5, "cpus_per_task": 2, "gpus_per_node": 4}
    assert str(resources([cell], slurm_settings(**said))) == "2 CPU, 4 GPU, 1.5 GB, 7 min"


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
        submission_settings([], None)


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"array_parallelism": "many"}, "slurm.array_parallelism: .*'many'"),
        ({"mem_gb": 0}, "slurm.mem_gb: .* 0"),
        ({"timeout_min": 2}, "signal_delay_s 120 leaves no time within a limit of 2 min"),
        ({"partitions": "main"}, "unknown key slurm.partitions; there are: partition, account"),
    ],
)
def test_a_wrong_setting_is_one_line(wrong: dict, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(fake_program(tmp_path, "sbatch", "true")))
    with pytest.raises(UserError, match=line):
        load_settings([f"slurm.{key}={json.dumps(value)}" for key, value in wrong.items()])


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
    assert {job: (told.word, told.detail) for job, told in queued(["1_0", "1_1"]).items()} == {
        **{"1_0": ("running", "node[7]"), "1_1": ("queued", "(Resources, or|so)")}
    }


def test_the_defaults_are_those_of_the_configuration() -> None:
    import yaml

    settings = yaml.safe_load((ROOT / "conf" / "slurm.yaml").read_text())["slurm"]
    assert settings == DEFAULTS and settings.keys() == set(SlurmConfig.__dataclass_fields__)
