"""Exit codes: what each of them means, and that a crash is told from all others."""

import os
import signal
import subprocess
import sys
import time

import pytest

from peerscale.errors import Aborted, ArgumentParser, FailedCells, UserError, exit_code
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


def test_a_termination_of_make_ends_what_it_started(tmp_path) -> None:
    program, pid = tmp_path / "python", tmp_path / "pid"
    program.write_text(f"#!/bin/sh\necho $$ > {pid}\nexec sleep 60\n")
    program.chmod(0o755)
    command = ["make", "-o", ".venv/installed", "-o", "setup", "sweep", "SWEEP=smoke", f"BIN={tmp_path}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (pid.is_file() and pid.read_text()):
        time.sleep(0.05)
    process.terminate()
    process.wait(30)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), signal.SIGKILL)


@pytest.mark.parametrize(("code", "drawn"), [(0, True), (4, False)])
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


@pytest.mark.parametrize("words", [["sweep", "smoke"], ["publish", "rates"], ["data", "figures", "nosuch"], ["rates"]])
def test_make_refuses_a_study_that_is_no_target(words: list[str]) -> None:
    result = make("-n", *words)
    assert result.returncode == 2 and result.stdout == ""
    assert f"SWEEP={words[-1]}" in result.stderr and result.stderr.count("\n") == 1


def test_make_hands_on_what_it_knows(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, log = tmp_path / "python", tmp_path / "log"
    program.write_text(f'#!/bin/sh\nprintf "[%s]" "$@" >> {log}\n')
    program.chmod(0o755)

    def handed(*words: str) -> str:
        log.unlink(missing_ok=True)
        assert make(*words, python=str(tmp_path)).returncode == 0
        return log.read_text()

    evil = f"a=1 'b=$(touch {tmp_path}/run)' [c]*; ${{oc.env:HOME}}"
    sweep = handed("sweep", "SWEEP=smoke; touch x", f"OVERRIDES={evil}", "JOBS=7")
    assert sweep == (
        f"[-m][peerscale.launch][smoke; touch x][--keep-going][--launcher][joblib][--jobs][7][OVERRIDES={evil}]"
    )
    assert handed("repeat", "CELL=a'b\"$(c)").endswith("[a'b\"$(c)]")
    assert "[--jobs][7][smoke]" in handed("plan", "SWEEP=smoke", "JOBS=7")
    assert "[--jobs][1][smoke]" in handed("plan", "SWEEP=smoke", "JOBS=7", "LAUNCHER=local")
    assert "publish.py][smoke][--replace]" in handed("publish", "SWEEP=smoke", "REPLACE=1")
    monkeypatch.setenv("REPLACE", "1")
    assert "--replace" not in handed("publish", "SWEEP=smoke")
    assert not (tmp_path / "run").exists()


def test_words_from_make_are_those_that_a_shell_would_make() -> None:
    parser = ArgumentParser()
    parser.add_argument("words", nargs="*")
    given = parser.parse_intermixed_args(["one", "OVERRIDES=a=[1] 'b=$(c) d' e\\ f"])
    assert given.words == ["one", "a=[1]", "b=$(c) d", "e f"]
    with pytest.raises(UserError, match="OVERRIDES='a: no closing quotation"):
        parser.parse_intermixed_args(["OVERRIDES='a"])


def test_make_runs_its_targets_in_turn_also_with_j(tmp_path) -> None:
    program, log = tmp_path / "python", tmp_path / "log"
    program.write_text(f"#!/bin/sh\necho begins >> {log}; sleep 0.2; echo ends >> {log}\n")
    program.chmod(0o755)
    assert make("-j", "8", "data", "sweep", "SWEEP=smoke", python=str(tmp_path)).returncode == 0
    assert log.read_text().split() == ["begins", "ends"] * 2
