from pathlib import Path

import pytest
from filelock import FileLock

from peerscale.accounting import CONVENTION
from peerscale.data.store import PREPARATION_VERSION, Manifest, folder, manifest_json
from peerscale.errors import exit_code
from peerscale.overview import main, text_table
from peerscale.runs.record import Status, write_record
from peerscale.sweeper import Cell, planned_cells
from toy_study import TOY, record_of, write_study


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return write_study(tmp_path, settings="min_steps: 65")


@pytest.fixture
def cells(study: Path) -> list[Cell]:
    return planned_cells(study)


@pytest.fixture
def corpus(cells: list[Cell]) -> str:
    """The fingerprint of what is prepared: a manifest is all that planning and status read."""
    manifest = Manifest(
        preparation_version=PREPARATION_VERSION,
        source="gutenberg",
        vocab_size=2048,
        dtype="uint16",
        splits={"train": 10**7, "validation": 10**6},
        utf8_bytes={"train": 10**8, "validation": 10**7},
        tokens_sha256={"train": "", "validation": ""},
        tokenizer_sha256="",
        sources={},
        versions={},
    )
    place = folder(cells[0].config.data)
    place.mkdir(parents=True)
    (place / "manifest.json").write_text(manifest_json(manifest))
    return manifest.fingerprint


def columns(line: str) -> list[str]:
    return line.split()


def test_the_plan_has_a_row_for_every_cell(study: Path, cells: list[Cell], capsys: pytest.CaptureFixture) -> None:
    main(["plan", str(study), "optim.lr=6e-3", "++optim.table_lr=7e-3"])
    header, *lines = capsys.readouterr().out.splitlines()
    assert columns(header) == [
        *("cell", "params", "active", "FLOPs/token", "layer", "steps", "tokens", "tokens/param"),
        *("lr", "table", "lr", "FLOPs/budget", "time"),
    ]
    expected = [cell.name.replace("-s0", "-lr=0.006-table_lr=0.007-s0") for cell in cells]
    assert [line.split()[0] for line in lines[:8]] == expected
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
    assert out[1].endswith("DROP: 43 steps < min_steps 65") or out[2].endswith("DROP: 43 steps < min_steps 65")
    kept = sum(cell.plan.flops for cell in cells if cell.plan.verdict == "OK")
    assert out[10].startswith(f"5 cells of 8, {kept:.3g} FLOPs ({CONVENTION}); ")
    assert out[10].endswith(" on one worker")
    assert out[11] == "time? is a guess: no finished cell of that method on this machine yet"


def test_a_plan_short_of_sizes_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    enough = TOY.removesuffix("}") + ", min_sizes: 2}"
    assert main(["plan", str(write_study(tmp_path, enough, "min_steps: 1"))]) == 0
    assert capsys.readouterr().err == ""
    assert main(["plan", str(write_study(tmp_path, enough, "min_steps: 65"))]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: dense has 1 sizes left at 1e10, fewer than 2",
        "error: peer has 0 sizes left at 1e10, fewer than 2",
    ]


def test_a_plan_without_the_corpus_says_what_is_not_known(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    main(["plan", str(write_study(tmp_path)), "min_steps=1", "data.train_tokens=null"])
    assert "the corpus is not prepared and its tokens not known" in capsys.readouterr().out
    main(["plan", str(write_study(tmp_path)), "min_steps=1"])
    assert "not known" not in capsys.readouterr().out


def test_a_prepared_corpus_is_counted_where_the_configuration_names_no_tokens(
    study: Path, corpus: str, capsys: pytest.CaptureFixture
) -> None:
    main(["plan", str(study), "min_steps=1", "data.train_tokens=null", "data.max_epochs=0.005"])
    out = capsys.readouterr().out
    assert "DROP: 0.01 epochs > max_epochs 0.005" in out  # 10^7 tokens, as the manifest says
    assert "not known" not in out


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
        "dense-d12-1e10-s0 dropped: 43 steps < min_steps 65",
        "dense-d12-3e10-s0 failed: OSError: no space",
        "dense-d16-3e10-s0 diverged: the loss is nan",
        "peer-d8-1e10-s0 dropped: 62 steps < min_steps 65",
        "peer-d12-1e10-s0 dropped: 40 steps < min_steps 65",
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


def test_a_cell_of_another_configuration_is_shown_as_refused(
    study: Path, cells: list[Cell], corpus: str, capsys: pytest.CaptureFixture
) -> None:
    write_record(cells[0].folder, record_of(cells[0], Status.DONE, corpus=corpus, config={"context": 32}))
    assert main(["status", str(study)]) == 0
    out = capsys.readouterr().out
    assert columns(out.splitlines()[1]) == ["dense-d8-s0", "refused"]
    assert "holds a run of another configuration: context 32 -> 64." in out


def test_status_reads_losses_without_the_corpus(study: Path, cells: list[Cell], capsys: pytest.CaptureFixture) -> None:
    write_record(cells[0].folder, record_of(cells[0], Status.DONE))
    assert main(["status", str(study)]) == 0
    assert columns(capsys.readouterr().out.splitlines()[1]) == ["dense-d8-s0", "5.2500"]


def test_status_without_the_corpus_shows_a_cell_evaluated_on_another_set(study: Path, cells: list[Cell]) -> None:
    write_record(cells[0].folder, record_of(cells[0], Status.DONE, evaluation={"tuning": {"loss": 5.0}}))
    assert main(["status", str(study)]) == 0


def test_a_wrong_request_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture) -> None:
    assert exit_code(lambda: main(["plan", "nosuch"])) == 2
    assert capsys.readouterr().err.startswith("error: no sweep file nosuch.yaml; in sweeps/ there are: ")
    assert exit_code(lambda: main(["status", "smoke", "budget"])) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_tables_are_aligned() -> None:
    rows = [["cell", "n", "time", ""], ["a", "10", "3 s", "OK"], ["long", "7", "12 min", "DROP: x"]]
    assert text_table(rows).splitlines() == [
        "cell   n    time",
        "a     10     3 s  OK",
        "long   7  12 min  DROP: x",
    ]
