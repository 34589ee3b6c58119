"""Which backend runs, and how the compiled one is made."""

import multiprocessing
import sys

import pytest
import torch

from peerscale.errors import UserError
from peerscale.layers import Peer
from peerscale.ops import backends, compiler
from peerscale.ops.backends import choose_operators


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
    script.write_text("#!/bin/sh\necho 'operators.cpp:1: fatal error: no omp.h' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(script))


def test_auto_is_the_fastest_backend_here():
    assert choose_operators("auto").name == "cpp"
    assert [choose_operators(name).name for name in ("cpp", "torch", "reference")] == ["cpp", "torch", "reference"]


@pytest.fixture
def with_triton(monkeypatch, forgetful):
    """As if the package were there, and no interpreter."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name == "triton" else None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def without_triton(monkeypatch, forgetful):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_auto_on_a_gpu(with_triton):
    assert choose_operators("auto", "cuda").name == choose_operators("triton", "cuda").name == "triton"
    assert choose_operators("auto", "cpu").name == "cpp"


def test_auto_where_no_backend_is_made_for_the_device(with_triton, capsys):
    assert choose_operators("auto", "mps").name == choose_operators("auto", "meta").name == "torch"
    assert not capsys.readouterr().err


def test_auto_on_a_gpu_without_triton_is_torch_with_one_line_of_notice(without_triton, capsys):
    assert choose_operators("auto", "cuda").name == choose_operators("auto", "cuda").name == "torch"
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("notice: kernel torch in place of the faster triton") and "peerscale[gpu]" in line


def test_triton_is_refused_where_it_cannot_run(with_triton):
    with pytest.raises(UserError) as error:
        choose_operators("triton", "cpu")
    assert str(error.value) == ("kernel triton cannot run here: it needs a GPU; these can: auto, cpp, torch, reference")


def test_triton_is_refused_where_it_is_not_installed(without_triton):
    with pytest.raises(UserError, match=r"there is no package triton.*; these can: auto, torch, reference$"):
        choose_operators("triton", "cuda")


def test_cpp_is_refused_on_a_gpu(with_triton):
    with pytest.raises(UserError, match=r"it is for the CPU; these can: auto, triton, torch, reference$"):
        choose_operators("cpp", "cuda")


@pytest.mark.parametrize("kernel", ["auto", "torch"])
def test_torch_compile_takes_a_layer(kernel):
    layer, x = Peer(6, 16, 2, 4, 8, operators=choose_operators(kernel)).eval(), torch.randn(5, 6)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager")(x), layer(x))


def test_unknown_backend():
    with pytest.raises(
        UserError, match="kernel 'tensor' does not exist; there are: auto, cpp, triton, torch, reference"
    ):
        choose_operators("tensor")


def test_without_a_compiler_auto_is_torch_with_one_line_of_notice(no_compiler, capsys):
    assert choose_operators("auto").name == choose_operators("auto").name == "torch"
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("notice: kernel torch") and "no C++ compiler" in lines[0]


def test_without_a_compiler_cpp_is_refused(no_compiler):
    with pytest.raises(UserError, match=r"kernel cpp cannot run here: no C\+\+ compiler"):
        choose_operators("cpp")


def test_a_compiler_that_fails_is_reported_in_one_line(broken_compiler, capsys):
    assert choose_operators("auto").name == "torch"
    [line] = capsys.readouterr().err.splitlines()
    assert "fatal error: no omp.h" in line


def test_a_cache_that_cannot_be_written_is_reported_in_one_line(monkeypatch, tmp_path, forgetful, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert choose_operators("auto").name == "torch"
    [line] = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "file") in line


@pytest.fixture
def short_source(monkeypatch, tmp_path, forgetful):
    """A source that is compiled at once."""
    monkeypatch.setattr(compiler, "SOURCE", tmp_path / "short.cpp")
    monkeypatch.setattr(compiler, "HEADERS", [])
    compiler.SOURCE.write_text('extern "C" int answer() { return 42; }')
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_processes_that_compile_at_once_share_one_library(tmp_path, short_source):
    processes = [
        multiprocessing.get_context("fork").Process(target=lambda: sys.exit(compiler.library().answer()))
        for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [42, 42]
    [library] = (tmp_path / "peerscale").iterdir()
    assert library.suffix == ".so"


def test_another_processor_or_source_has_a_library_of_its_own(monkeypatch, tmp_path, short_source):
    """Where a home folder is shared: no library is run on a processor that it was not compiled for."""
    for processor in ("flags: avx2", "flags: avx2 avx512f"):
        monkeypatch.setattr(compiler, "instruction_sets", lambda processor=processor: processor)
        compiler.library.cache_clear()
        compiler.library()
    compiler.SOURCE.write_text("int another;")
    compiler.library.cache_clear()
    compiler.library()
    assert len(list((tmp_path / "peerscale").iterdir())) == 3
