"""Cells on two processes: the same as on one, whatever the layer, and an end of both whatever happens to either."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from peerscale.accounting import cost
from peerscale.config import Config, load, parse_config, to_dict
from peerscale.data.prepare import prepare
from peerscale.data.store import open_corpus
from peerscale.files import ROOT
from peerscale.plan import Verdict, plan
from peerscale.runs.record import Status, read_record
from peerscale.runs.table import read_metrics
from peerscale.training import cell, distributed
from peerscale.training.cell import build_module, fit
from peerscale.training.checkpoint import TimedCheckpoint, checkpoints
from peerscale.training.evaluation import Evaluation, evaluate
from test_train import budget, corpus_path, settings, train  # noqa: F401

STEPS = 6
CPU = torch.device("cpu")

# A bias before a BatchNorm has no gradient but rounding errors, which AdamW makes as large as any.
CASES = {
    "dense": ["ffn=dense"],
    "moe": ["ffn=moe", "ffn.n_experts=4"],
    "moe in bf16": ["ffn=moe", "ffn.capacity_factor=2", "precision=bf16"],
    "token choice": ["ffn=moe_token_choice", "ffn.load_balance_weight=1"],
    "pkm": ["ffn=pkm", "ffn.query_bias=false"],
    "peer": ["ffn=peer", "ffn.query_bias=false", "replaced=all"],
    "peer, row-sparse": ["ffn=peer", "ffn.query_bias=false", "optim=row_sparse_adamw", "trainer.kernel=fused"],
    "peer, reference": ["ffn=peer", "ffn.query_bias=false", "trainer.kernel=reference"],
    "pkm, row-sparse, sharded": [
        "ffn=pkm", "ffn.query_bias=false", "optim=row_sparse_adamw", "trainer.shard_tables=true",
    ],
    "peer, sharded": ["ffn=peer", "ffn.query_bias=false", "trainer.shard_tables=true", "trainer.kernel=fused"],
}  # fmt: skip


class Rows(list[dict[str, Any]]):
    """Stands for a tracker."""

    def log(self, row: dict[str, Any]) -> None:
        self.append({key: value for key, value in row.items() if key != "tokens_per_s"})


def trained(config: Config, folder: Path) -> tuple[Rows, Evaluation, dict[str, Any]]:
    """Metrics, evaluation and last checkpoint of a cell, on every rank that calls it; the checkpoint on the first."""
    rows, corpus = Rows(), open_corpus(config.data)
    saving = TimedCheckpoint(folder, 1e9, STEPS)
    planned = plan(config)
    assert planned.verdict is Verdict.OK and planned.steps == STEPS
    module = build_module(config, planned)
    fit(module, corpus, rows, saving, None)  # type: ignore[arg-type]
    evaluation = evaluate(module, corpus, config, CPU)
    newest = checkpoints(folder)
    return rows, evaluation, torch.load(newest[0], weights_only=True) if newest else {}


def second_rank() -> None:
    """Program of the process beside the test's."""
    job = json.loads(sys.stdin.readline())
    print("ready", flush=True)
    with distributed._group(CPU, 1, 2, job["rendezvous_file"]):
        for tree in job["configs"]:
            trained(parse_config(tree), Path(job["folder"], "nothing is written here"))
    assert not Path(job["folder"], "nothing is written here").exists()


@pytest.fixture(scope="module")
def configs(corpus_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:  # noqa: F811
    folder = tmp_path_factory.mktemp("cells")
    found = {}
    for name, case in CASES.items():
        overrides = [*settings.__wrapped__(corpus_path, folder), *case, "optim.lr=2e-3"]
        found[name] = load([*overrides, budget(overrides, STEPS)])
    prepare(found["dense"].data, quiet=True)
    return found


@pytest.fixture(scope="module")
def on_two(
    configs: dict[str, Config], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Rows, Evaluation, dict[str, Any]]]:
    """What comes of all cases on two processes."""
    folder = tmp_path_factory.mktemp("two")
    two = {
        name: parse_config({**to_dict(config), "trainer": {**to_dict(config)["trainer"], "devices": 2}})
        for name, config in configs.items()
    }
    job = {"configs": [to_dict(config) for config in two.values()], "folder": str(folder)}
    with pytest.MonkeyPatch.context() as patch:
        folders = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(folders))
        patch.setattr(distributed, "PROGRAM", "from test_distributed import second_rank; second_rank()")
        with distributed.ranks(2, CPU, job):
            return {name: trained(config, folder / str(i)) for i, (name, config) in enumerate(two.items())}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_what_one_does(
    case: str, configs: dict[str, Config], on_two: dict[str, Any], tmp_path: Path
) -> None:
    rows, evaluation, checkpoint = trained(configs[case], tmp_path)
    rows_of_two, evaluation_of_two, checkpoint_of_two = on_two[case]
    rel, absolute = (2e-3, 2e-3) if "bf16" in case else (2e-5, 2e-6)
    assert len(rows) == len(rows_of_two) == STEPS / 2
    for row, row_of_two in zip(rows, rows_of_two, strict=True):
        assert row_of_two == pytest.approx(row, rel=rel, abs=absolute)
    assert evaluation_of_two.sets["validation"] == pytest.approx(evaluation.sets["validation"], rel=rel, abs=absolute)
    assert evaluation_of_two.sequence_losses == pytest.approx(evaluation.sequence_losses, rel=1e-2, abs=2e-5)
    assert evaluation_of_two.router == pytest.approx(evaluation.router, rel=rel, abs=absolute)
    if "bf16" in case:
        return
    weights, weights_of_two = checkpoint["state_dict"], checkpoint_of_two["state_dict"]
    assert weights.keys() == weights_of_two.keys()
    for name, weight in weights.items():
        assert distance(weights_of_two[name], weight) < 2e-5, name
    moments, moments_of_two = (c["optimizer_states"][0]["state"] for c in (checkpoint, checkpoint_of_two))
    for i, state in moments.items():  # which tell a gradient of another scale, as AdamW's weights do not
        for key, value in state.items():
            assert distance(moments_of_two[i][key], value) < 1e-3, (i, key)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative, of whole tensors: a single weight with a gradient of rounding errors may be anywhere."""
    return float((a - b).double().norm() / b.double().norm())


@pytest.fixture
def parallel(settings: list[str]) -> list[str]:
    return [
        *settings, "tracking=disabled", "trainer.devices=2", "trainer.checkpoint_every_steps=4",
        "trainer.keep_checkpoint=true",
    ]  # fmt: skip


@pytest.fixture
def unevaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the first cell is copied to between its training and its evaluation, with its last two checkpoints."""
    copy = tmp_path / "unevaluated"

    def copy_first(*arguments: Any) -> Evaluation:
        if not copy.exists():
            shutil.copytree(tmp_path / "runs", copy)
        return evaluate(*arguments)

    monkeypatch.setattr(cell, "evaluate", copy_first)
    return copy


def broken_off_at(step: int, unevaluated: Path, copy: Path) -> None:
    """A copy of a cell as it would be, had it been killed after `step`."""
    shutil.copytree(unevaluated, copy)
    for path in copy.glob("single/*/checkpoints/*"):
        if path.name != f"step-{step:09d}.ckpt":
            path.unlink()


def test_a_cell_on_two_processes_is_resumed(
    parallel: list[str], unevaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    overrides = [*parallel, *CASES["peer, row-sparse"]]
    overrides.append(budget(overrides, 8))
    status, unbroken = train(overrides)
    assert (status, unbroken.reason) == (Status.DONE, "")
    assert unbroken.environment["n_devices"] == 2
    folder = tmp_path / "runs" / "single" / unbroken.cell
    assert [p.name for p in checkpoints(folder / "checkpoints")] == ["step-000000008.ckpt"]

    broken_off_at(4, unevaluated, tmp_path / "again")
    status, again = train([*overrides, f"trainer.runs_directory={tmp_path / 'again'}"])
    assert status is Status.DONE and again.bit_exact
    assert again.sequence_losses == unbroken.sequence_losses and again.evaluation == unbroken.evaluation
    copy = tmp_path / "again" / "single" / unbroken.cell
    states = [torch.load(checkpoints(f / "checkpoints")[0], weights_only=True) for f in (folder, copy)]
    for name, weight in states[0]["state_dict"].items():
        assert torch.equal(states[1]["state_dict"][name], weight), name
    assert "notice" not in capsys.readouterr().err

    broken_off_at(4, unevaluated, tmp_path / "alone")
    status, alone = train([*overrides, f"trainer.runs_directory={tmp_path / 'alone'}", "trainer.devices=1"])
    assert status is Status.DONE and not alone.bit_exact
    assert alone.sequence_losses == pytest.approx(unbroken.sequence_losses, abs=2e-5)
    assert f"{alone.cell} goes on with another n_devices: not bit-exact" in capsys.readouterr().err


def test_a_cell_begun_on_one_process_goes_on_on_two(
    parallel: list[str], unevaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    overrides = [*parallel, *CASES["peer, sharded"]]
    overrides.append(budget(overrides, 8))
    _, alone = train([*overrides, "trainer.devices=1"])
    broken_off_at(4, unevaluated, tmp_path / "two")
    status, two = train([*overrides, f"trainer.runs_directory={tmp_path / 'two'}"])
    assert status is Status.DONE and not two.bit_exact
    assert two.sequence_losses == pytest.approx(alone.sequence_losses, abs=2e-5)
    assert "goes on with another n_devices: not bit-exact" in capsys.readouterr().err


FAILS = (
    "import os, signal; from peerscale.training import module; from peerscale.training.distributed import *\n"
    "def fail(self, tokens, batch_idx):\n    {}\n"
    "module.LanguageModel.training_step = fail; further_rank()"
)


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        ("raise MemoryError('too large')", "RankError: rank 1: MemoryError: too large"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "RankError: rank 1: ended by SIGKILL"),
    ],
)
def test_a_failing_rank_ends_the_cell_with_its_reason(
    failure: str, reason: str, parallel: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "PROGRAM", FAILS.format(failure))
    status, record = train([*parallel, "ffn=dense", budget([*parallel, "ffn=dense"], 8)])
    assert (status, record.reason) == (Status.FAILED, reason)
    assert ("too large" in record.traceback) == ("MemoryError" in reason)
    assert not torch.distributed.is_initialized() and not ranks_of(os.getpid())


def test_a_rank_that_cannot_start_ends_the_cell(parallel: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "PROGRAM", "import sys; sys.exit(3)")
    status, record = train([*parallel, "ffn=dense", budget([*parallel, "ffn=dense"], 8)])
    assert (status, record.reason) == (Status.FAILED, "RankError: rank 1: exit 3")
    assert not ranks_of(os.getpid())


def test_a_failure_of_the_first_rank_is_its_own(parallel: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from peerscale.training.module import LanguageModel

    def fail(*_: object) -> None:
        raise ValueError("out of something")

    monkeypatch.setattr(LanguageModel, "training_step", fail)
    status, record = train([*parallel, "ffn=dense", budget([*parallel, "ffn=dense"], 8)])
    assert (status, record.reason) == (Status.FAILED, "ValueError: out of something")
    assert not ranks_of(os.getpid())


def ranks_of(parent: int) -> list[int]:
    """Living ranks that `parent` started: it may have children of other kinds, such as W&B's service."""
    commands = {child: Path(f"/proc/{child}/cmdline").read_text() for child in children(parent)}
    return [child for child, command in commands.items() if "distributed" in command]


def children(parent: int) -> list[int]:
    """Living processes that `parent` started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, started_by = path.read_text().rpartition(")")[2].split()[:2]
            if int(started_by) == parent and state != "Z":
                found.append(int(path.parent.name))
    return found


@contextlib.contextmanager
def training(overrides: list[str], runs: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A cell of two processes in a session of its own, as of a terminal, once it trains; and its further ranks."""
    process = subprocess.Popen(
        [sys.executable, "-m", "peerscale.train", *overrides],
        cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        while not any(list(read_metrics(cell)) for cell in (runs / "single").glob("*")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        yield process, children(process.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def ended(processes: list[int], within_s: float = 10.0) -> bool:
    limit = time.monotonic() + within_s
    while alive := [p for p in processes if Path(f"/proc/{p}").exists()]:
        if time.monotonic() > limit:
            return not alive
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_all_processes_and_leaves_a_cell_that_goes_on(
    number: signal.Signals, parallel: list[str], tmp_path: Path
) -> None:
    overrides = [*parallel, "ffn=peer", "trainer.checkpoint_every_steps=50"]
    overrides.append(budget(overrides, 30_000))
    overrides.append("data.max_epochs=10000")
    prepare(load(overrides).data, quiet=True)
    with training(overrides, tmp_path / "runs") as (process, others):
        assert len(others) == 1
        for meant_for_the_first in distributed.SIGNALS:
            os.kill(others[0], meant_for_the_first)
        (folder,) = (tmp_path / "runs" / "single").iterdir()
        before = len(list(read_metrics(folder)))
        while len(list(read_metrics(folder))) < before + 5:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        if number is signal.SIGKILL:
            process.kill()  # the first rank alone
        else:
            os.killpg(process.pid, number)  # all, as a terminal and Slurm do
        _, errors = process.communicate(timeout=60)
        assert ended(others)
    assert "Traceback" not in errors
    assert process.returncode == (-9 if number is signal.SIGKILL else 130), errors
    record = read_record(folder)
    assert record is not None and record.status is Status.RUNNING
    if number is signal.SIGTERM:
        (newest, *_) = checkpoints(folder / "checkpoints")
        rows = list(read_metrics(folder))
        assert int(newest.stem.removeprefix("step-")) - rows[-1]["step"] in (0, 1), (
            "saved at the step that it ended with"
        )


def test_what_cannot_be_shared_is_dropped_with_its_reason() -> None:
    three = plan(load(["ffn=dense", "trainer.devices=3"]))
    assert three.verdict is Verdict.DROP
    assert three.reason == "16 sequences cannot be shared by trainer.devices 3; allowed: 1, 2, 4, 8, 16"
    sharded = ["ffn=peer", "ffn.n_experts=49", "ffn.top_k=4", "trainer.devices=2", "budget=1e12"]
    assert plan(load([*sharded, "trainer.shard_tables=false"])).verdict is Verdict.OK
    dropped = plan(load([*sharded, "trainer.shard_tables=true"]))
    assert dropped.reason == "tables of 49 rows cannot be sharded evenly over trainer.devices 2"
    assert cost(load(sharded)) == cost(load([*sharded, "trainer.shard_tables=true"]))
