"""Which backend runs, and how the compiled one is made."""

import os
import subprocess
import sys

import pytest

from peerscale.errors import UserError
from peerscale.kernels import backends, compiler
from peerscale.kernels.backends import BACKENDS, resolve


@pytest.fixture
def forgetful():
    """Nothing is remembered from, or for, other tests."""

    def forget():
        compiler.library.cache_clear()
        backends._fastest.cache_clear()

    forget()
    yield
    forget()


@pytest.fixture
def no_compiler(monkeypatch, tmp_path, forgetful):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)


@pytest.fixture
def broken_compiler(monkeypatch, tmp_path, forgetful):
    script = tmp_path / "broken"
    script.write_text("#!/bin/sh\necho 'fused.cpp:1: fatal error: no omp.h' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(script))


def test_auto_is_the_fastest_backend_here():
    assert resolve("auto") == "fused"
    assert [resolve(name) for name in BACKENDS] == list(BACKENDS)


def test_unknown_backend():
    with pytest.raises(UserError, match="kernel 'triton' does not exist; there are: auto, fused, native, reference"):
        resolve("triton")


def test_without_a_compiler_auto_is_native_with_one_line_of_notice(no_compiler, capsys):
    assert resolve("auto") == resolve("auto") == "native"
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("notice: kernel native") and "no C++ compiler" in lines[0]


def test_without_a_compiler_fused_is_refused(no_compiler):
    with pytest.raises(UserError, match=r"kernel fused cannot run here: no C\+\+ compiler"):
        resolve("fused")


def test_a_compiler_that_fails_is_reported_in_one_line(broken_compiler, capsys):
    assert resolve("auto") == "native"
    [line] = capsys.readouterr().err.splitlines()
    assert "fatal error: no omp.h" in line


def test_a_cache_that_cannot_be_written_is_reported_in_one_line(monkeypatch, tmp_path, forgetful, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert resolve("auto") == "native"
    [line] = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "file") in line


def test_processes_that_compile_at_once_share_one_library(tmp_path):
    program = "from peerscale.kernels.compiler import library; library().peerscale_find; print('loaded')"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", program]
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0] for process in processes] == ["loaded\n"] * 2
    [library] = (tmp_path / "peerscale").iterdir()
    assert library.suffix == ".so"


def test_another_processor_or_source_has_a_library_of_its_own(monkeypatch, tmp_path, forgetful):
    """Where a home folder is shared: no library is run on a processor that it was not compiled for."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiler, "FLAGS", ["-O0", *compiler.FLAGS[2:]])
    for processor in ("flags: avx2", "flags: avx2 avx512f"):
        monkeypatch.setattr(compiler, "instruction_sets", lambda processor=processor: processor)
        compiler.library.cache_clear()
        compiler.library()
    assert len(list((tmp_path / "peerscale").iterdir())) == 2
