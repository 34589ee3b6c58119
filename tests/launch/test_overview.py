import re
from pathlib import Path

import pytest
from filelock import FileLock

from peerscale.data.store import PREPARATION_VERSION, Manifest, folder, write_manifest
from peerscale.files import ROOT
from peerscale.launch.overview import main
from peerscale.launch.plan_table import duration
from peerscale.launch.speed import estimates
from peerscale.launch.status_table import word_and_note
from peerscale.plan.cell import Cell
from peerscale.plan.cells import planned_cells
from peerscale.plan.cost import CONVENTION
from peerscale.records.outcome import Outcome
from peerscale.records.record import Status, write_record
from toy_study import TOY, kept_in, record_of, write_study


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return write_study(tmp_path, settings="min_steps: 65")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> list[Cell]:
    return planned_cells(write_study(tmp_path_factory.mktemp("toy"), settings="min_steps: 65"))


@pytest.fixture
def cells(toy: list[Cell], study: Path) -> list[Cell]:
    return [kept_in(study.parent, cell) for cell in toy]


@pytest.fixture
def corpus(cells: list[Cell]) -> str:
    """The fingerprint of what is prepared: a manifest is all that planning and status read."""
    manifest = Manifest(
        preparation_version=PREPARATION_VERSION,
        vocab_size=2048,
        splits={"train": 10**7, "validation": 10**6},
        utf8_bytes={"train": 10**8, "validation": 10**7},
        tokens_sha256={"train": "", "validation": ""},
        tokenizer_sha256="",
        sources={},
    )
    place = folder(cells[0].config.data)
    place.mkdir(parents=True)
    write_manifest(place, manifest)
    return manifest.fingerprint


def columns(line: str) -> list[str]:
    return line.split()


def test_the_plan_has_a_row_for_every_cell(study: Path, cells: list[Cell], capsys: pytest.CaptureFixture) -> None:
    main(["plan", str(study), "optim.lr=6e-3", "++optim.table_lr=7e-3", "optim.lr_rule=inverse_sqrt_width"])
    header, *lines = capsys.readouterr().out.splitlines()
    assert columns(header) == [
        *("params", "active", "FLOPs/token", "layer", "steps", "tokens", "tokens/param"),
        *("lr", "table", "lr", "FLOPs/budget", "time"),
    ]
    expected = [cell.name.replace("-s0", "-lr=0.006-table_lr=0.007-lr_rule=inverse_sqrt_width-s0") for cell in cells]
    assert [columns(line)[0] for line in lines[:8]] == expected
    # dense, d_model 8, 4 layers, 2,048 words, 64 tokens: 16,384 embedded, 12 d^2 a layer, 9 norms of d.
    parameters = 2048 * 8 + 4 * 12 * 8 * 8 + 9 * 8
    per_token = 3 * (4 * (24 * 8 * 8 + 4 * 64 * 8) + 2 * 2048 * 8)
    steps = round(1e10 / (per_token * 1024))
    assert columns(lines[0]) == [
        *(expected[0], f"{parameters:,}", f"{parameters:,}", f"{per_token:,}"),
        f"{4 * 0.25 * 16 * 8 * 8 * 3 / per_token:.1%}",
        *(f"{steps:,}", f"{steps * 1024:,}", f"{steps * 1024 / parameters:.1f}", "0.012", "0.007"),
        *(f"{steps * 1024 * per_token / 1e10:.4f}", *columns(lines[0])[-3:-1], "OK"),
    ]
    assert columns(lines[0])[-2].endswith("s?")
    assert columns(lines[6])[9] == "0.007"


def test_the_plan_gives_the_reason_of_what_is_dropped_and_the_total_of_the_rest(
    study: Path, cells: list[Cell], capsys: pytest.CaptureFixture
) -> None:
    main(["plan", str(study), "trainer.threads=2"])
    out = capsys.readouterr().out.splitlines()
    assert columns(out[2])[-1] == "DROP" and columns(out[1])[-1] == "OK"
    too_few = "too few steps, 43 of min_steps 65: the smallest budget for this cell is about 1.50e+10"
    assert out[12] == f"{cells[1].name} dropped: {too_few}"
    kept = sum(cell.plan.flops for cell in cells if cell.plan.verdict == "OK")
    assert out[10].startswith("active: ") and "layer: share of the training FLOPs in the replaced layer" in out[10]
    assert out[15] == f"5 cells of 8, {kept:.3g} FLOPs ({CONVENTION})"
    assert re.fullmatch(r"make sweep SWEEP=toy: 5 cells to run, about \d+ s on one worker", out[16])
    assert out[17] == "time? is estimated from committed runs: no finished cell of that method on this machine yet"


def test_a_plan_short_of_sizes_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    enough = TOY.removesuffix("}") + ", min_sizes: 2}"
    assert main(["plan", str(write_study(tmp_path, enough, "min_steps: 1"))]) == 0
    assert capsys.readouterr().err == ""
    assert main(["plan", str(write_study(tmp_path, enough, "min_steps: 65"))]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: dense has 1 size left at 1e10, fewer than 2",
        "error: peer has 0 sizes left at 1e10, fewer than 2",
    ]


def test_a_plan_without_the_corpus_says_what_is_not_known(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for tokens, said in (("null", True), ("1e7", False)):
        main(["plan", str(write_study(tmp_path)), "min_steps=1", f"data.train_tokens={tokens}"])
        assert ("the corpus is not prepared and its size is not known" in capsys.readouterr().out) == said


def test_the_plan_says_what_the_corpus_has_of_the_evaluation(
    study: Path, corpus: str, capsys: pytest.CaptureFixture
) -> None:
    main(["plan", str(study), "min_steps=1"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("evaluation: ")]
    skipped = "speeches: not in this corpus, skipped; wikipedia: not in this corpus, skipped"
    assert line == f"evaluation: validation 131,072 tokens; {skipped}"


def test_status_is_a_grid_of_what_became_of_every_cell(
    study: Path, cells: list[Cell], corpus: str, capsys: pytest.CaptureFixture
) -> None:
    kept = [cell for cell in cells if cell.plan.verdict == "OK"]
    done, failed, diverged, interrupted, _ = kept
    write_record(done.folder, record_of(done, Status.DONE, corpus=corpus))
    write_record(failed.folder, record_of(failed, Status.FAILED, corpus=corpus, reason="OSError: no space"))
    write_record(diverged.folder, record_of(diverged, Status.DIVERGED, corpus=corpus, reason="the loss is nan"))
    write_record(interrupted.folder, record_of(interrupted, Status.RUNNING, corpus=corpus))
    assert main(["status", str(study)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [columns(line) for line in out[:7]] == [
        ["1e10", "3e10"],
        ["dense-d8-s0", "5.2500"],
        ["dense-d12-s0", "dropped", "failed"],
        ["dense-d16-s0", "diverged"],
        ["peer-d8-s0", "dropped"],
        ["peer-d12-s0", "dropped", "interrupted"],
        ["peer-d16-s0", "pending"],
    ]
    assert out[8] == (
        f"1 done, 3 dropped, 1 failed, 1 diverged, 1 interrupted, 1 pending; losses in nats per token ({study})"
    )
    assert out[9:] == [
        *(f"dense-d12-1e10-s0 dropped: {cells[1].plan.reason}", "dense-d12-3e10-s0 failed: OSError: no space"),
        "dense-d16-3e10-s0 diverged: the loss is nan",
        *(f"{cell.name} dropped: {cell.plan.reason}" for cell in cells[4:6]),
    ]


def test_a_cell_that_is_held_is_running(
    study: Path, cells: list[Cell], corpus: str, capsys: pytest.CaptureFixture
) -> None:
    write_record(cells[0].folder, record_of(cells[0], Status.RUNNING, corpus=corpus))
    with FileLock(cells[0].folder / "lock"):
        main(["status", str(study)])
    assert columns(capsys.readouterr().out.splitlines()[1]) == ["dense-d8-s0", "running"]
    main(["status", str(study)])
    assert columns(capsys.readouterr().out.splitlines()[1]) == ["dense-d8-s0", "interrupted"]


def test_a_cell_of_another_configuration_or_with_a_damaged_record_is_shown_as_refused(
    study: Path, cells: list[Cell], corpus: str, capsys: pytest.CaptureFixture
) -> None:
    write_record(cells[0].folder, record_of(cells[0], Status.DONE, corpus=corpus, config={"context": 32}))
    (damaged := cells[6].folder).mkdir()
    (damaged / "record.json").write_text("{")
    assert main(["status", str(study)]) == 0
    out = capsys.readouterr().out
    assert columns(out.splitlines()[1]) == ["dense-d8-s0", "refused"] and "2 refused" in out
    assert "holds a run of another configuration: context 32 -> 64." in out
    assert f"mv '{damaged}' '{damaged}.old'" in out
    assert main(["plan", str(study)]) == 2
    out, errors = capsys.readouterr()
    assert columns(out.splitlines()[1])[-1] == columns(out.splitlines()[7])[-1] == "refused"
    assert "context 32 -> 64." in errors and f"mv '{damaged}'" in errors


@pytest.mark.parametrize(("on", "shown"), [("validation", "5.2500"), ("tuning", "done")])
def test_status_without_the_corpus(
    on: str, shown: str, study: Path, cells: list[Cell], capsys: pytest.CaptureFixture
) -> None:
    write_record(cells[0].folder, record_of(cells[0], Status.DONE, evaluation={on: {"loss": 5.25}}))
    assert main(["status", str(study)]) == 0
    assert columns(capsys.readouterr().out.splitlines()[1]) == ["dense-d8-s0", shown]


def test_the_plan_marks_cells_that_have_ended_and_leaves_them_out_of_the_time(
    study: Path, cells: list[Cell], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, diverged, *left = [cell for cell in cells if cell.plan.verdict == "OK"]
    write_record(done.folder, record_of(done, Status.DONE, timing={"flops_per_s": 1e8}))
    write_record(diverged.folder, record_of(diverged, Status.DIVERGED))
    opened = []
    for name, read in (("read_bytes", Path.read_bytes), ("read_text", Path.read_text)):
        noted = lambda path, *a, read=read, **k: opened.append(path) or read(path, *a, **k)  # noqa: E731
        monkeypatch.setattr(Path, name, noted)
    main(["plan", str(study), "--jobs", "2"])
    assert opened.count(done.folder / "record.json") == 1
    lines = capsys.readouterr().out.splitlines()
    shown = {columns(line)[0]: columns(line)[-1] for line in lines[1:9]}
    assert [shown[cell.name] for cell in (done, diverged, *left)] == ["done", "diverged", "OK", "OK", "OK"]
    seconds = {name: found.s for name, found in estimates(cells).items()}
    workers = [0.0, 0.0]
    for cell_s in sorted((seconds[cell.name] for cell in left), reverse=True):
        workers[workers.index(min(workers))] += cell_s
    (command,) = [line for line in lines if line.startswith("make sweep")]
    assert command == f"make sweep SWEEP=toy: 3 cells to run, about {duration(max(workers))} on 2 workers"


def test_the_log_of_a_job_is_named_if_there_is_one(cells: list[Cell]) -> None:
    log = cells[0].folder.parent / "study" / "slurm" / "7_1_0_log.err"
    pending = Outcome(cell=cells[0], status=Status.PENDING)
    cancelled = f"{cells[0].name} interrupted: Slurm job 7_1 ended before it began"
    assert word_and_note(pending, "7_1", "") == ("interrupted", cancelled)
    log.parent.mkdir(parents=True)
    log.touch()
    assert word_and_note(pending, "7_1", "")[1].endswith(f"Slurm job 7_1 has ended, see {log}")


def test_cells_that_the_plan_does_not_have_are_counted_apart(
    study: Path, cells: list[Cell], capsys: pytest.CaptureFixture
) -> None:
    (other,) = planned_cells(study, ["optim.lr=1e-3", "sweep.methods=[dense]", "sweep.budgets=[1e10]", "n_layers=3"])[
        :1
    ]
    write_record(other.folder, record_of(other, Status.DONE))
    (cells[0].folder.parent / "dense-d8-1e10-s0.old").mkdir()
    assert main(["status", str(study)]) == 0
    out = capsys.readouterr().out
    assert f"1 further cell not in the plan: {other.name}\n" in out
    assert "3 dropped" in out and "5 pending" in out and " done" not in out


def test_studies_are_listed_with_question_and_state(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "smoke").mkdir()
    cell = planned_cells("smoke")[0]
    write_record(tmp_path / "smoke" / cell.name, record_of(cell, Status.DONE))
    assert main(["studies", "--runs", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("smoke "))
    assert lines[at].split(maxsplit=1)[1] == "10 cells; finished with any settings: 1 in runs/, 0 in results/"
    assert lines[at + 1].startswith("    does everything work, from text to figure?")
    listed = [line.split()[0] for line in lines if line and not line.startswith((" ", "make"))]
    assert listed == sorted(file.stem for file in (ROOT / "sweeps").glob("*.yaml"))
    assert any(line.startswith("reproduce ") and line.endswith(": 0 in runs/, 40 in results/") for line in lines)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (45.4, "45 s"), (89, "89 s"), (90, "2 min"), (360, "6 min"), (5399, "90 min"), (5400, "1.5 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
