"""Cells on two processes: the same as on one, whatever the layer, and an end of both whatever happens to either."""

import contextlib
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from peerscale.config.schema import Config, composed, load
from peerscale.data.store import open_corpus
from peerscale.errors import FAILED_CELLS, UserError
from peerscale.files import ROOT
from peerscale.launch.run import main
from peerscale.plan.cells import Cell, single_cell
from peerscale.plan.plan import Verdict, plan
from peerscale.records.curves import read_metrics
from peerscale.records.record import Record, Status, read_record
from peerscale.train import cell, distributed, module
from peerscale.train import rank as rank_program
from peerscale.train.cell import build_module, fit, train_cell
from peerscale.train.checkpoint import TimedCheckpoint, checkpoints
from peerscale.train.distributed import joined_ranks, started_ranks
from peerscale.train.evaluation import evaluate
from peerscale.train.run import run_cell
from peerscale.train.table_exchange import TableExchange
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
    "peer, row-sparse": ["ffn=peer", "ffn.query_bias=false", "optim=row_sparse_adamw", "trainer.kernel=cpp"],
    "peer, reference": ["ffn=peer", "ffn.query_bias=false", "trainer.kernel=reference"],
    "moe, in groups": ["ffn=moe", "ffn.n_experts=4", "routing_group_sequences=4"],
    "peer, in groups": ["ffn=peer", "ffn.query_bias=false", "routing_group_sequences=8"],
    "peer, in micro-batches": [
        "ffn=peer",
        "ffn.query_bias=false",
        "optim=row_sparse_adamw",
        "routing_group_sequences=4",
        "trainer.micro_batches=2",
    ],
    "peer in bf16": ["ffn=peer", "ffn.query_bias=false", "optim=row_sparse_adamw", "precision=bf16"],
    "pkm, row-sparse": ["ffn=pkm", "ffn.query_bias=false", "optim=row_sparse_adamw"],
}


class Rows(list[dict[str, Any]]):
    """Stands for a tracker."""

    def log(self, row: dict[str, Any]) -> None:
        self.append({key: value for key, value in row.items() if key != "tokens_per_s"})


def trained(config: Config, folder: Path) -> tuple[Rows, dict[str, Any], dict[str, Any]]:
    """Metrics, evaluation and last checkpoint of a cell, on every rank that calls it; the checkpoint on the first."""
    rows, corpus = Rows(), open_corpus(config.data)
    saving = TimedCheckpoint(folder, 1e9, STEPS)
    planned = plan(config)
    assert planned.verdict is Verdict.OK and planned.steps == STEPS
    module = build_module(config, planned, CPU)
    fit(module, corpus, rows, saving, None)  # type: ignore[arg-type]
    evaluation = evaluate(module, corpus, config, CPU)
    newest = checkpoints(folder)
    return rows, evaluation, torch.load(newest[0], weights_only=True) if newest else {}


def train_all() -> None:
    """Program of each of two ranks, which join once for everything; the first rank keeps what comes of it.

    All cases, a cell of which copies are kept, one that goes on from such a copy, one begun on one process, and at last
    the cell that was launched, which fails.
    """
    job = pickle.loads(Path(os.environ["JOB"]).read_bytes())
    rank, folder, cells = started_ranks()[0], job["folder"], job["cells"]
    sys.stderr = (folder / f"{rank}.err").open("w", buffering=1)
    with joined_ranks(CPU):
        found = {name: trained(config, folder / f"{rank} {name}") for name, config in job["configs"].items()}
        assert rank == 0 or not list(folder.glob("1 *"))
        if rank == 0:
            (folder / "found.pickle").write_bytes(pickle.dumps(found))
        dist.init_process_group = dist.destroy_process_group = lambda *_, **__: None
        with broken_off_copies(cells["unbroken"], *([cells["again"], cells["alone"]] if rank == 0 else [])):
            train_cell(cells["unbroken"])
        train_cell(cells["again"])
        train_cell(cells["two"])
        if rank == 1:
            module.LanguageModel.training_step = fail
        rank_program.main()


def fail(self: module.LanguageModel, tokens: torch.Tensor, batch_idx: int) -> None:
    raise MemoryError("too large")


@contextlib.contextmanager
def broken_off_copies(original: Cell, *copies: Cell) -> Iterator[None]:
    """Copy a cell between its training and its evaluation, as it would be had it been killed after step 4."""

    def copy_first(*arguments: Any) -> dict[str, Any]:
        for copy in copies:
            shutil.copytree(original.folder, copy.folder, dirs_exist_ok=True)
            for path in (copy.folder / "checkpoints").iterdir():
                if path.name != "step-000000004.ckpt":
                    path.unlink()
        return evaluate(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cell, "evaluate", copy_first)
        yield


@pytest.fixture(scope="module")
def configs(corpus_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:  # noqa: F811
    folder = tmp_path_factory.mktemp("cells")
    found = {}
    for name, case in CASES.items():
        rate = ["optim.lr_rule=inverse_sqrt_width", "optim.lr=2e-3"]
        overrides = [*settings.__wrapped__(corpus_path, folder), *case, *rate]
        found[name] = load([*overrides, budget(overrides, STEPS)])
    return found


@pytest.fixture(scope="module")
def cells(corpus_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Cell]:  # noqa: F811
    """Cells of 8 steps, the same ones on one process and on two, each in a folder of its own."""
    planned = {}
    for name, case, n_ranks in (
        ("unbroken", "peer, row-sparse", 2), ("again", "peer, row-sparse", 2), ("alone", "peer, row-sparse", 1),
        ("one", "peer, reference", 1), ("two", "peer, reference", 2), ("fails", "dense", 2),
    ):  # fmt: skip
        overrides = [*on_two_ranks(settings.__wrapped__(corpus_path, tmp_path_factory.mktemp(name))), *CASES[case]]
        planned[name] = single_cell(composed([*overrides, budget(overrides, 8), f"trainer.devices={n_ranks}"]))
    return planned


def on_two_ranks(settings: list[str]) -> list[str]:
    return [
        *settings, "tracking=disabled", "trainer.devices=2", "trainer.checkpoint_every_steps=4",
        "trainer.keep_checkpoint=true",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def launched(configs: dict[str, Config], cells: dict[str, Cell], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a launch of two ranks, which trained all cases and cells, and failed at last."""
    folder = tmp_path_factory.mktemp("launched")
    with broken_off_copies(cells["one"], cells["two"]):
        assert train_cell(cells["one"]) is Status.DONE
    two = {name: replace(config, trainer=replace(config.trainer, devices=2)) for name, config in configs.items()}
    job = folder / "job.pickle"
    job.write_bytes(pickle.dumps({"configs": two, "cells": cells, "folder": folder}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JOB", str(job))
        run_in_ranks(patch, "from test_distributed import train_all; train_all()")
        assert run_cell(cells["fails"]) is Status.FAILED
    return folder


@pytest.fixture(scope="module")
def on_two(launched: Path) -> dict[str, tuple[Rows, dict[str, Any], dict[str, Any]]]:
    """What comes of all cases on two processes."""
    return pickle.loads((launched / "found.pickle").read_bytes())


@pytest.mark.parametrize("kernel", ["reference", "torch", "cpp"])
def test_a_penalty_on_a_table_is_exchanged_as_well(kernel: str) -> None:
    """With `optim=adamw`; its gradient is dense, that of retrieved rows is made of factors."""
    config = load(["ffn=pkm", "d_model=8", "ffn.n_experts=64", "ffn.top_k=4", f"trainer.kernel={kernel}"])
    gradients = []
    for exchanged in (False, True):
        torch.manual_seed(0)
        model = module.LanguageModel(config, plan(config))
        exchange = TableExchange(model) if exchanged else None
        (table,) = model.groups.tables
        loss = model.losses(torch.randint(256, (16, 9), generator=torch.Generator().manual_seed(1)))[0]
        (loss + 0.1 * table.square().sum()).backward()
        if exchange:
            exchange.on_before_optimizer_step()
        gradients.append(table.grad)
    torch.testing.assert_close(*gradients)


def run_in_ranks(patch: pytest.MonkeyPatch, program: str) -> None:
    """Let ranks run `program`, which finds the tests' modules."""
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    patch.setenv("PYTHONPATH", os.pathsep.join(folders))
    patch.setattr(distributed, "PROGRAM", ("-c", program))


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_what_one_does(
    case: str, configs: dict[str, Config], on_two: dict[str, Any], tmp_path: Path
) -> None:
    rows, evaluation, checkpoint = trained(configs[case], tmp_path)
    rows_of_two, evaluation_of_two, checkpoint_of_two = on_two[case]
    # In bf16 a query that rounds otherwise may retrieve another expert: so may halves of a batch on one process.
    rel, absolute = {"moe in bf16": (2e-3, 2e-3), "peer in bf16": (1e-2, 1e-2)}.get(case, (2e-5, 2e-6))
    assert len(rows) == len(rows_of_two) == STEPS / 2
    for row, row_of_two in zip(rows, rows_of_two, strict=True):
        assert row_of_two == pytest.approx(row, rel=rel, abs=absolute)
    sets, sets_of_two = evaluation["evaluation"], evaluation_of_two["evaluation"]
    assert sets_of_two["validation"] == pytest.approx(sets["validation"], rel=rel, abs=absolute)
    assert evaluation_of_two["sequence_losses"] == pytest.approx(evaluation["sequence_losses"], rel=1e-2, abs=2e-5)
    assert evaluation_of_two["router"] == pytest.approx(evaluation["router"], rel=rel, abs=absolute)
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
    return on_two_ranks(settings)


def done(cell: Cell) -> Record:
    record = read_record(cell.folder)
    assert record is not None and (record.status, record.reason) == (Status.DONE, "")
    return record


def test_a_cell_on_two_processes_is_resumed(
    launched: Path, cells: dict[str, Cell], capsys: pytest.CaptureFixture
) -> None:
    unbroken, again = done(cells["unbroken"]), done(cells["again"])
    assert unbroken.environment["n_devices"] == 2
    kept = [checkpoints(cells[name].folder / "checkpoints") for name in ("unbroken", "again")]
    assert [[path.name for path in paths] for paths in kept] == [["step-000000008.ckpt"]] * 2
    assert again.bit_exact
    assert again.sequence_losses == unbroken.sequence_losses and again.evaluation == unbroken.evaluation
    states = [torch.load(paths[0], weights_only=True) for paths in kept]
    for name, weight in states[0]["state_dict"].items():
        assert torch.equal(states[1]["state_dict"][name], weight), name

    run_cell(cells["alone"])
    alone = done(cells["alone"])
    assert not alone.bit_exact
    assert alone.sequence_losses == pytest.approx(unbroken.sequence_losses, abs=2e-5)
    assert f"{alone.cell} continues with another n_devices: not bit-exact" in capsys.readouterr().err


def test_a_cell_begun_on_one_process_goes_on_on_two(launched: Path, cells: dict[str, Cell]) -> None:
    alone, two = done(cells["one"]), done(cells["two"])
    assert not two.bit_exact
    assert two.sequence_losses == pytest.approx(alone.sequence_losses, abs=2e-5)
    notices = [line for line in (launched / "0.err").read_text().splitlines() if line.startswith("notice")]
    assert notices == [f"notice: {two.cell} continues with another n_devices: not bit-exact"], "and `again` with none"


def test_a_failing_rank_ends_the_cell_with_its_reason(launched: Path, cells: dict[str, Cell]) -> None:
    record = read_record(cells["fails"].folder)
    assert record is not None
    assert (record.status, record.reason) == (Status.FAILED, "RankError: rank 1: MemoryError: too large")
    assert ", in fail\n" in record.traceback
    assert not ranks_of(os.getpid())


@pytest.mark.parametrize("code", [0, FAILED_CELLS])
def test_a_first_rank_that_has_recorded_how_it_ended_raises_nothing(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run_in_ranks(monkeypatch, f"import sys; sys.exit({code})")
    distributed.launch(1, {})


def test_a_rank_ends_with_0_if_its_cell_is_done(launched: Path, cells: dict[str, Cell], tmp_path: Path) -> None:
    job = tmp_path / "cell.pickle"
    job.write_bytes(pickle.dumps(cells["one"]))
    assert rank_program.run_rank(job) == 0


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import sys; sys.exit(4)", "RankError: rank [01]: exit 4"),
        ("import os, time; os.kill(os.getpid(), 9) if os.environ['RANK'] == '1' else time.sleep(60)",
         "RankError: rank 1: ended by SIGKILL"),
    ],
)  # fmt: skip
def test_a_rank_that_ends_without_a_word_ends_the_cell(
    program: str, reason: str, parallel: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_in_ranks(monkeypatch, program)
    status, record = train([*parallel, "ffn=dense", budget([*parallel, "ffn=dense"], 8)])
    assert status is Status.FAILED and re.fullmatch(reason, record.reason)
    assert not ranks_of(os.getpid())


def test_wrong_input_that_a_rank_finds_is_the_users_to_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    found = "from torch.distributed.elastic.multiprocessing.errors import record\n"
    found += "from peerscale.errors import UserError\n@record\ndef main(): raise UserError('no such thing')\nmain()"
    run_in_ranks(monkeypatch, found)
    with pytest.raises(UserError, match="no such thing"):
        distributed.launch(1, {})


def test_ranks_that_torchrun_started_train_one_cell(parallel: list[str], tmp_path: Path) -> None:
    overrides = [*parallel, "ffn=dense"]
    overrides.append(budget(overrides, 8))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "localhost"]
    ran = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", "-m", "peerscale.train", *overrides],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    (folder,) = (tmp_path / "runs" / "single").iterdir()
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("is done") == 1
    record = read_record(folder)
    assert record is not None and record.status is Status.DONE and record.environment["n_devices"] == 2
    alone = tmp_path / "alone"
    _, of_one = train([*overrides, f"trainer.runs_directory={alone}", "trainer.devices=1"])
    assert record.sequence_losses == pytest.approx(of_one.sequence_losses, abs=2e-5)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["trainer.devices=3"], "torchrun or srun started 2 processes, but trainer.devices is 3"),
        (["smoke"], "torchrun and srun start the ranks of one cell; a study starts the ranks of its cells itself"),
    ],
)
def test_what_ranks_cannot_run_is_refused(
    words: list[str], problem: str, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    if words == ["smoke"]:
        with pytest.raises(UserError, match=problem):
            main(words)
    else:
        overrides = [*settings, *words, "ffn=dense", "batch_sequences=12", "tracking=disabled"]
        with pytest.raises(UserError, match=problem):
            train([*overrides, budget(overrides, 8)])


def ranks_of(parent: int) -> list[int]:
    """Living ranks that `parent` started: it may have children of other kinds, such as W&B's service."""
    commands = {child: Path(f"/proc/{child}/cmdline").read_text() for child in children(parent)}
    return [child for child, command in commands.items() if "rank.main()" in command or "training.rank" in command]


def children(parent: int) -> list[int]:
    """Living processes that `parent` started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, started_by = path.read_text().rpartition(")")[2].split()[:2]
            if int(started_by) == parent and state != "Z":
                found.append(int(path.parent.name))
    return found


def ended(processes: list[int], within_s: float = 10.0) -> bool:
    limit = time.monotonic() + within_s
    while alive := [p for p in processes if Path(f"/proc/{p}").exists()]:
        if time.monotonic() > limit:
            return not alive
        time.sleep(0.05)
    return True


@contextlib.contextmanager
def started(program: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process in a session of its own, as of a terminal, which is ended with all that it started."""
    command = [sys.executable, *program]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def wait(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def test_a_signal_ends_all_processes_and_leaves_a_cell_that_goes_on(parallel: list[str], tmp_path: Path) -> None:
    overrides = [*parallel, "ffn=peer", "trainer.checkpoint_every_steps=50"]
    overrides.append(budget(overrides, 30_000))
    with started(["-m", "peerscale.train", *overrides, "data.max_epochs=10000"]) as process:
        wait(process, lambda: any(list(read_metrics(cell)) for cell in (tmp_path / "runs" / "single").glob("*")))
        others = ranks_of(process.pid)
        assert len(others) == 2
        for warning in (signal.SIGUSR1, signal.SIGUSR2):
            os.kill(others[1], warning)
        (folder,) = (tmp_path / "runs" / "single").iterdir()
        before = len(list(read_metrics(folder)))
        wait(process, lambda: len(list(read_metrics(folder))) >= before + 5)
        os.killpg(process.pid, signal.SIGTERM)  # all, as a terminal and Slurm do
        _, errors = process.communicate(timeout=60)
        assert ended(others)
    assert "Traceback" not in errors
    assert process.returncode == 130, errors
    record = read_record(folder)
    assert record is not None and record.status is Status.RUNNING
    (newest, *_) = checkpoints(folder / "checkpoints")
    rows = list(read_metrics(folder))
    assert int(newest.stem.removeprefix("step-")) - rows[-1]["step"] in (0, 1), "saved at the step that it ended with"


def test_ranks_end_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    sign = f"Path({str(tmp_path)!r}, os.environ['RANK']).touch()"
    trains = "import os, time; from pathlib import Path; from peerscale.train import rank\n"
    trains += f"rank.run_rank = lambda _: {sign} or time.sleep(60)\nrank.main()"
    launches = f"from peerscale.train import distributed; distributed.PROGRAM = ('-c', {trains!r})\n"
    with started(["-c", f"{launches}distributed.launch(2, {{}})"]) as process:
        wait(process, lambda: len(list(tmp_path.iterdir())) == 2)
        ranks = ranks_of(process.pid)
        assert len(ranks) == 2
        process.kill()
        assert process.wait(10) == -signal.SIGKILL and ended(ranks)
