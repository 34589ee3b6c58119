"""Training for real, on a tiny corpus: from text to a figure, interrupted and resumed, failed and diverged."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from small_cells import EXPLODES, break_off, budget, final_weights, planned, train

from peerscale.config.schema import composed, load
from peerscale.data.prepare import prepare
from peerscale.errors import UserError
from peerscale.files import ROOT
from peerscale.layers.dense import Dense
from peerscale.plan.cells import single_cell
from peerscale.records.curves import read_metrics
from peerscale.records.record import CHECKSUM, Record, Status, parse_record, read_record, write_record
from peerscale.records.table import read_runs, write_records
from peerscale.train.module import LanguageModel
from peerscale.train.run import run_cell
from programs import Result, call

LAYERS = sorted(path.stem for path in (ROOT / "conf" / "ffn").glob("*.yaml"))


@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_trains_and_learns(layer: str, settings: list[str]) -> None:
    overrides = [*settings, f"ffn={layer}", "tracking=disabled", "trainer.log_every_steps=20"]
    status, record = train([*overrides, budget(overrides, 60)])
    assert status is Status.DONE
    assert record.evaluation["validation"]["loss"] < math.log(300) - 1, "that of one guess in 300 tokens is ln 300"
    assert ("unevenness" in record.router) == layer.startswith(("peer", "pkm", "memory", "moe", "fine", "balanced"))


@pytest.mark.parametrize(
    ("recipe", "layer"),
    [
        *(
            ("precision=fp32", layer)
            for layer in ("dense", "moe", "moe_token_choice", "fine_grained_moe", "pkm", "peer")
        ),
        *(("precision=bf16", layer) for layer in ("moe", "peer")),
        *(("optim=row_sparse_adamw", layer) for layer in ("pkm", "peer")),
        ("replaced=all", "balanced_moe"),  # whose biases have no gradient
        *((f"replaced=all {optim}", "memory_plus") for optim in ("optim=adamw", "optim=row_sparse_adamw")),
        ("replaced=all", "engram"),
    ],
)
def test_an_interrupted_cell_ends_as_an_unbroken_one(
    recipe: str, layer: str, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*settings, f"ffn={layer}", *recipe.split(), "tracking=disabled"]
    overrides += [budget(overrides, 7), "trainer.checkpoint_every_steps=1", "trainer.keep_checkpoint=true"]
    _, unbroken = train([*overrides, f"trainer.runs_directory={tmp_path / 'unbroken'}"])
    calls = break_off(monkeypatch, 4, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        train(overrides)
    status, resumed = train(overrides)
    assert status is Status.DONE
    assert len(calls) == 3 + 1 + 4, "three steps, one broken off, and only the four that were missing"
    assert resumed.bit_exact
    assert resumed.sequence_losses == unbroken.sequence_losses
    assert resumed.evaluation == unbroken.evaluation
    cell = f"single/{resumed.cell}"
    ours, theirs = (final_weights(tmp_path / where / cell) for where in ("runs", "unbroken"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    rows, expected = (
        [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in read_metrics(tmp_path / where / cell)]
        for where in ("runs", "unbroken")
    )
    assert rows == expected and [row["step"] for row in rows] == [2, 4, 6, 7]


def test_a_layer_that_draws_random_numbers_goes_on_with_the_next(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*settings, "ffn=dense", "tracking=disabled", "trainer.checkpoint_every_steps=1", budget(settings, 7)]
    _, plain = train([*overrides, f"trainer.runs_directory={tmp_path / 'plain'}"])
    forward = Dense.forward
    monkeypatch.setattr(Dense, "forward", lambda self, x: F.dropout(forward(self, x), 0.5, self.training))
    _, unbroken = train([*overrides, f"trainer.runs_directory={tmp_path / 'unbroken'}"])
    break_off(monkeypatch, 4, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        train(overrides)
    _, resumed = train(overrides)
    assert resumed.bit_exact and resumed.sequence_losses == unbroken.sequence_losses != plain.sequence_losses


def test_a_corpus_that_is_replaced_in_training_changes_no_evaluation(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    words = Path(load(settings).data.path).read_text()
    overrides = [*settings, f"data.path={text}", f"data.directory={tmp_path / 'data'}", "tracking=disabled"]
    text.write_text(words)
    prepare(load(overrides).data)
    overrides.append(budget(overrides, 6))
    _, undisturbed = train([*overrides, f"trainer.runs_directory={tmp_path / 'undisturbed'}"])
    step, replaced = LanguageModel.training_step, []

    def replacing(self: LanguageModel, *args: object) -> object:
        if not replaced:
            text.write_text(words[::-1])
            replaced.append(prepare(load(overrides).data).manifest.fingerprint)
        return step(self, *args)

    monkeypatch.setattr(LanguageModel, "training_step", replacing)
    _, record = train(overrides)
    assert record.hashed_config["data_fingerprint"] != replaced[0]
    assert record.sequence_losses == undisturbed.sequence_losses


def test_a_done_cell_is_not_run_again_and_another_configuration_is_refused(settings: list[str]) -> None:
    overrides = [*settings, "tracking=disabled", budget(settings, 6)]
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="torch sees no GPU"):
            train([*overrides, "trainer.accelerator=gpu"])
        assert not planned(*overrides).folder.exists(), "a refused run leaves no folder"
    _, first = train(overrides)
    _, second = train([*overrides, "trainer.threads=2"])
    assert second == first, "threads don't change what a cell is"
    cell = single_cell(composed(overrides))
    cell = replace(cell, config=load([*overrides, "optim.weight_decay=0.5"]))  # as if conf/ had been edited
    with pytest.raises(UserError, match=r"another configuration: optim.weight_decay 0.1 -> 0.5"):
        run_cell(cell)
    assert read_record(cell.folder) == first, "what was there before stays"
    assert not (cell.folder / "wandb").exists(), "tracking=disabled"


def test_a_diverged_cell_is_run_again_only_once_its_folder_is_set_aside(settings: list[str], tmp_path: Path) -> None:
    overrides = [*settings, "tracking=disabled", budget(settings, 8), *EXPLODES]
    overrides += ["trainer.checkpoint_every_steps=1", "trainer.log_every_steps=1"]
    status, first = train(overrides)
    folder = tmp_path / "runs" / "single" / first.cell
    assert status is Status.DIVERGED and not list(folder.glob("checkpoints/*"))
    rows = list(read_metrics(folder))
    written = (folder / "record.json").stat().st_mtime_ns
    assert train(overrides) == (Status.DIVERGED, first)
    assert (folder / "record.json").stat().st_mtime_ns == written
    assert list(read_metrics(folder)) == rows and all(row["loss"] == row["loss"] for row in rows)
    folder.rename(f"{folder}.old")
    status, again = train(overrides)
    assert (status, again.reason) == (Status.DIVERGED, first.reason)


def test_the_time_of_a_resumed_cell_is_that_of_all_its_parts(
    settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*settings, "tracking=disabled", budget(settings, 6), "trainer.checkpoint_every_steps=1"]
    calls = break_off(monkeypatch, 5, RuntimeError("broken off"), seconds=0.3)
    status, failed = train(overrides)
    assert (status, failed.reason) == (Status.FAILED, "RuntimeError: broken off") and "in broken" in failed.traceback
    status, record = train(overrides)
    assert status is Status.DONE and len(calls) == 5 + 2
    assert record.timing["wall_s"] > (4 + 2) * 0.3
    assert record.timing["tokens_per_s"] == pytest.approx(record.plan["tokens"] / record.timing["wall_s"])


def test_what_a_killed_process_left_half_written_is_removed(settings: list[str], tmp_path: Path) -> None:
    overrides = [*settings, "tracking=disabled", budget(settings, 6)]
    cell = single_cell(composed(overrides)).folder
    for scratch in (cell / ".record.json.abcd1234", cell / "checkpoints" / ".step-000000003.ckpt.x_y_z_12"):
        scratch.mkdir(parents=True)
        (scratch / "half").write_text("half")
    train(overrides)
    assert not list(cell.rglob(".*"))


def test_wandb_receives_what_metrics_jsonl_holds_also_from_two_processes(settings: list[str], tmp_path: Path) -> None:
    status, record = train([*settings, "ffn=dense", "trainer.devices=2", budget(settings, 8)])
    assert status is Status.DONE, record.traceback
    folder = tmp_path / "runs" / "single" / record.cell
    (run,) = (folder / "wandb").glob("offline-run-*")
    command = [Path(sys.executable).parent / "wandb", "leet", "inspect", "--json", run]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    rows = list(read_metrics(folder))
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert all(json.dumps(row["tokens"]) in text and repr(row["loss"])[:8] in text for row in rows)
    assert record.cell in text and "train/loss" in text


@pytest.fixture
def study(settings: list[str], tmp_path: Path) -> Path:
    """A study of four cells: one of them diverges, and two are dropped."""
    keys = [word for word in settings if not word.startswith(("data=", "d_model=", "batch_sequences="))]
    grid = {"budget": float(budget([*settings, "ffn=dense"], 12).removeprefix("budget=")), "d_model": [8]}
    tree = {
        "defaults": [{"override data": "text"}, {"override tracking": "disabled"}],
        "sweep": {
            "methods": ["dense", "peer"],
            "grid": [grid],
            "axes": {"batch_sequences": [16, 64]},
            "method_axes": {"peer": {"optim.lr": [1e30]}},
            "min_sizes": 1,
        },
        "optim": {"lr_rule": "constant", "warmup_fraction": 0},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(OmegaConf.to_yaml(OmegaConf.merge(tree, OmegaConf.from_dotlist(keys))))
    return path


def test_a_sweep_evaluates_on_what_a_new_corpus_has_and_says_so_once(study: Path, tmp_path: Path) -> None:
    part = f"sweep.methods=[dense] sweep.seeds=[0,1] data.directory={tmp_path / 'new'}"
    done = call(f"launch {study} {part} data.evaluation.validation=131072 +data.evaluation.speeches=4096")
    assert done.code == 0, done.err
    (manifest,) = (tmp_path / "new").glob("*/manifest.json")
    held = json.loads(manifest.read_text())["splits"]["validation"]
    tokens = (held - 1) // 8 // 16 * 16 * 8  # whole batches of 16 x 8
    notices = [line for line in done.err.splitlines() if line.startswith("notice: ")]
    assert notices == [
        f"notice: evaluation: validation {tokens:,} of 131,072 tokens asked; speeches: not in this corpus, skipped"
    ]
    records = [read_record(path.parent) for path in (tmp_path / "runs" / "tiny").glob("*/record.json")]
    assert len(records) == 2
    for record in records:
        assert record is not None and record.status is Status.DONE
        assert {name: values["tokens"] for name, values in record.evaluation.items()} == {"validation": tokens}
        assert len(record.sequence_losses) == tokens // 8


def test_a_sweep_goes_on_after_failures_and_skips_what_is_done(study: Path, tmp_path: Path) -> None:
    sweep = f"launch {study}"
    first = call(sweep)
    assert first.code == 3, first.err
    assert "4 cells, 0 done, 2 dropped, 2 to run" in first.err
    assert "error: 1 of 4 cells failed: peer-d8-l2-" in first.err
    assert "Traceback" not in first.err
    records = {path.parent.name: path.stat().st_mtime_ns for path in (tmp_path / "runs" / "tiny").glob("*/record.json")}
    assert len(records) == 2
    second = call(sweep)
    assert "2 dropped, 0 to run" in second.err, "a diverged cell would diverge again"
    after = {path.parent.name: path.stat().st_mtime_ns for path in (tmp_path / "runs" / "tiny").glob("*/record.json")}
    assert after == records
    status = call(f"overview status {study}")
    assert status.code == 0, status.err
    assert "2 dropped" in status.out and "1 diverged" in status.out and "1 done" in status.out
    assert "the training loss is" in status.out


@pytest.mark.parametrize("last_whole", [0, 1], ids=["at its start", "at its end"])
def test_an_error_of_the_disk_costs_its_run_alone(
    last_whole: int, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[Path] = []

    def broken(folder: Path, record: Record) -> None:
        folders.append(folder)
        if folder == folders[0] and len(folders) > last_whole:
            raise OSError(errno.EIO, "Input/output error")
        write_record(folder, record)

    line = f"launch {study} sweep.methods=[dense] sweep.seeds=[0,1]"
    with monkeypatch.context() as patch:
        patch.setattr("peerscale.train.cell.write_record", broken)
        done = call(line)
    assert done.code == 3 and "failed: [Errno 5] Input/output error" in done.err and "Traceback" not in done.err
    assert "error: 1 of 4 cells failed" in done.err, "two are dropped"
    assert call(line).code == 0


def test_a_committed_cell_is_trained_again_and_compared(study: Path, tmp_path: Path) -> None:
    assert call(f"launch {study} sweep.methods=[dense]").code == 0
    (path,) = (tmp_path / "runs" / "tiny").glob("*/record.json")
    record = json.loads(path.read_text())
    values = {key: value for key, value in record.items() if key != CHECKSUM}
    published = tmp_path / "results" / "tiny"
    command = f"repeat {study} {record['cell']} --runs {tmp_path / 'again'} --results {published.parent}"

    def repeated(**changes: object) -> Result:
        write_records(published, [parse_record({**values, **changes}, "published")])
        return call(command)

    same = repeated()
    assert same.code == 0 and same.out.count("the same, bit for bit") == len(record["evaluation"]) > 0, same
    assert "environment" not in same.out
    again = tmp_path / "again" / "tiny" / record["cell"] / "record.json"
    written = again.stat().st_mtime_ns
    higher = {name: {**values, "loss": values["loss"] + 0.5} for name, values in record["evaluation"].items()}
    differs = repeated(evaluation=higher, environment={**record["environment"], "torch": "0.1"})
    assert differs.code == 0 and "differs by -5.0e-01" in differs.out
    assert f"torch {torch.__version__} (0.1)" in differs.out
    told = repeated(environment={**record["environment"], "mkl": "avx512"})
    assert "environment here (committed): mkl None (avx512); remove that folder and repeat with AVX512=1" in told.out
    assert again.stat().st_mtime_ns == written, "it is trained only once"
    hashed = {**record["hashed_config"], "optim": {**record["hashed_config"]["optim"], "weight_decay": 0.5}}
    refused = repeated(fingerprint="another", hashed_config=hashed)
    assert refused.code == 2 and "so it cannot be repeated: optim.weight_decay 0.5 -> 0.1" in refused.err
    unknown = call(command.replace("-s0", "-s7"))
    assert unknown.code == 2 and f"similar ones: {record['cell']}" in unknown.err


def hear_ctrl_c() -> None:
    """As a process started from a terminal, whatever the one that runs the tests blocks or ignores."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def test_ctrl_c_leaves_a_cell_that_goes_on(settings: list[str], tmp_path: Path) -> None:
    overrides = [*settings, "tracking=disabled", "trainer.checkpoint_every_steps=20"]
    overrides.append(budget(overrides, 3000))
    prepare(load(overrides).data)
    process = subprocess.Popen(
        [sys.executable, "-m", "peerscale.train", *overrides], cwd=ROOT, stderr=subprocess.PIPE, text=True,
        preexec_fn=hear_ctrl_c,
    )  # fmt: skip
    folder = tmp_path / "runs" / "single"
    try:
        while not (
            list(folder.glob("*/checkpoints/step-*.ckpt"))
            and any(list(read_metrics(cell)) for cell in folder.iterdir())
        ):
            assert process.poll() is None
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "interrupted; the same command goes on where this one stopped" in errors
    assert "Traceback" not in errors
    (cell,) = folder.iterdir()
    record = read_record(cell)
    assert record is not None and record.status is Status.RUNNING
    assert list(read_metrics(cell))


def test_a_two_cell_sweep_goes_from_text_to_figure(study: Path, tmp_path: Path) -> None:
    tree = OmegaConf.load(study)
    del tree.sweep.axes, tree.sweep.method_axes
    study.write_text(OmegaConf.to_yaml(tree))
    for part, said in (
        ("sweep.methods=[dense]", "1 cells, 0 done, 0 dropped, 1 to run"),
        ("", "2 cells, 1 done, 0 dropped, 1 to run"),
    ):
        sweep = call(f"launch {study} {part}")
        assert sweep.code == 0 and said in sweep.err, sweep.err
    for script in ("collect", "figures"):
        result = call(f"{script} tiny --runs {tmp_path / 'runs'}")
        assert result.code == 0, result.err
    folder = tmp_path / "runs" / "tiny" / "study"
    runs = read_runs(folder)
    assert list(runs["method"]) == ["dense", "peer"] and runs["val_loss"].notna().all()
    assert (folder / "figures" / "isoflop.png").read_bytes()[:4] == b"\x89PNG"
    assert "d_model 8" in (folder / "table.md").read_text()
