"""Exit codes: what each of them means, and that a crash is told from all others."""

import os
import subprocess
import sys

import pytest

from peerscale.errors import Aborted, FailedCells, UserError, exit_code
from peerscale.files import ROOT


def raising(error: BaseException) -> int:
    raise error


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("wrong"), 2, "error: wrong\n"),
        (FailedCells("one failed"), 3, "error: one failed\n"),
        (Aborted("killed"), 4, "error: killed\n"),
        (KeyboardInterrupt(), 130, "\ninterrupted; the same command goes on where this one stopped\n"),
    ],
)
def test_each_kind_of_end_has_a_code(error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture) -> None:
    assert exit_code(lambda: raising(error)) == code
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("error", [RuntimeError("a mistake of the program"), BrokenPipeError("of a worker")])
def test_a_crash_stays_a_crash(error: Exception) -> None:
    with pytest.raises(type(error)):
        exit_code(lambda: raising(error))


@pytest.mark.parametrize("options", [[], ["-u"]], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_stops_is_no_error(lines: int, options: list[str]) -> None:
    main = f"lambda: [print(i) for i in range({lines})] and None"
    program = f"import sys; from peerscale.errors import exit_code; sys.stdin.read(); sys.exit(exit_code({main}))"
    command = [sys.executable, *options, "-c", program]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin and process.stdout and process.stderr
    process.stdout.close()  # before anything is printed
    process.stdin.close()
    assert (process.wait(60), process.stderr.read()) == (0, b"")


def make(*words: str, python: str = "true") -> subprocess.CompletedProcess[str]:
    """What `make` does if every program of the environment were this one."""
    command = ["make", "-o", ".venv/installed", "-o", "setup", *words, f"BIN={python}"]
    # As a user calls it, not as a target of the make that runs the tests.
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    }
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(("code", "ends"), [(0, 0), (1, 2), (2, 2), (3, 0), (4, 2), (130, 2)])
def test_make_sweep_goes_on_after_failed_cells_only(code: int, ends: int, tmp_path) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\nexit {code}\n")
    program.chmod(0o755)
    assert make("sweep", "SWEEP=smoke", python=str(tmp_path)).returncode == ends


@pytest.mark.parametrize(("code", "drawn"), [(3, True), (4, False)])
def test_no_figures_are_drawn_of_an_aborted_sweep(code: int, drawn: bool, tmp_path) -> None:
    program, log = tmp_path / "python", tmp_path / "log"
    program.write_text(f'#!/bin/sh\necho "$@" >> {log}\ncase "$*" in *peerscale.launch*) exit {code};; esac\n')
    program.chmod(0o755)
    assert (make("reproduce", python=str(tmp_path)).returncode == 0) == drawn
    assert "peerscale.launch reproduce" in log.read_text()
    assert ("figures" in log.read_text()) == drawn


@pytest.mark.parametrize("word", ["sweep=smoke", "b=2", "sweep.methods=[peer]"])
def test_make_refuses_a_variable_that_it_does_not_know(word: str) -> None:
    result = make("-n", "status", "SWEEP=smoke", "OVERRIDES=a=1 c=3", word)
    assert result.returncode == 2 and result.stdout == ""
    assert f"{word.partition('=')[0]} is no variable of this Makefile" in result.stderr
    assert "OVERRIDES='key=value key=value'" in result.stderr and result.stderr.count("\n") == 1


def test_make_hands_on_what_it_knows() -> None:
    sweep = make("-n", "sweep", "SWEEP=smoke", "OVERRIDES=a=1 c=3", "JOBS=7", python="B").stdout
    assert "-m peerscale.launch smoke --launcher joblib --jobs 7 a=1 c=3" in sweep
    assert "--jobs 7 smoke" in make("-n", "plan", "SWEEP=smoke", "JOBS=7", python="B").stdout
    assert "--jobs 1 smoke" in make("-n", "plan", "SWEEP=smoke", "JOBS=7", "LAUNCHER=local", python="B").stdout
    assert "publish.py smoke --replace" in make("-n", "publish", "SWEEP=smoke", "REPLACE=1", python="B").stdout
    assert "--replace" not in make("-n", "publish", "SWEEP=smoke", python="B").stdout


def test_make_runs_its_targets_in_turn_also_with_j(tmp_path) -> None:
    program, log = tmp_path / "python", tmp_path / "log"
    program.write_text(f"#!/bin/sh\necho begins >> {log}; sleep 0.2; echo ends >> {log}\n")
    program.chmod(0o755)
    assert make("-j", "8", "data", "sweep", "SWEEP=smoke", python=str(tmp_path)).returncode == 0
    assert log.read_text().split() == ["begins", "ends"] * 2
