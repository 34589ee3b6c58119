"""Which backend runs, and how the compiled one is made."""

import multiprocessing
import subprocess
import sys

import pytest

from peerscale.errors import UserError
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


@pytest.fixture(params=[True, False])
def triton(request, monkeypatch, forgetful):
    """As if the package were there, or not, and no interpreter."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if request.param else None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return request.param


def test_auto_is_the_fastest_backend_here():
    assert choose_operators("auto").name == "cpp"
    assert [choose_operators(name).name for name in ("cpp", "torch", "reference")] == ["cpp", "torch", "reference"]


def test_auto_on_other_devices(triton, capsys):
    names = [choose_operators("auto", device).name for device in ("cuda", "cuda", "cpu", "mps", "meta")]
    assert names == [*(["triton"] if triton else ["torch"]) * 2, "cpp", "torch", "torch"]
    lines = capsys.readouterr().err.splitlines()
    if triton:
        assert choose_operators("triton", "cuda").name == "triton" and not lines
    else:
        assert len(lines) == 1 and "peerscale[gpu]" in lines[0]
        assert lines[0].startswith("notice: kernel torch in place of the faster triton")


def test_a_backend_is_refused_where_it_cannot_run(triton):
    others = "auto, triton, torch, reference" if triton else "auto, torch, reference"
    for kernel, device, reason in (
        ("triton", "cpu", "it needs a GPU; these can: auto, cpp, torch, reference"),
        ("cpp", "cuda", f"it is for the CPU; these can: {others}"),
    ):
        with pytest.raises(UserError) as error:
            choose_operators(kernel, device)
        assert str(error.value) == f"kernel {kernel} cannot run here: {reason}"
    if not triton:
        with pytest.raises(UserError, match="there is no package triton"):
            choose_operators("triton", "cuda")


def test_unknown_backend():
    with pytest.raises(
        UserError, match="kernel 'tensor' does not exist; there are: auto, cpp, triton, torch, reference"
    ):
        choose_operators("tensor")


def no_compiler(monkeypatch, folder):
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CXX", raising=False)


def broken_compiler(monkeypatch, folder):
    script = folder / "broken"
    script.write_text("#!/bin/sh\necho 'operators.cpp:1: fatal error: no omp.h' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))


def no_cache(monkeypatch, folder):
    (folder / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "file"))


@pytest.mark.parametrize(
    ("fault", "said"),
    [(no_compiler, "no C++ compiler"), (broken_compiler, "fatal error: no omp.h"), (no_cache, "/file")],
)
def test_without_a_library_auto_is_torch_with_one_line_of_notice(fault, said, monkeypatch, tmp_path, forgetful, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fault(monkeypatch, tmp_path)
    assert choose_operators("auto").name == choose_operators("auto").name == "torch"
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("notice: kernel torch in place of the faster cpp") and said in line
    with pytest.raises(UserError, match="kernel cpp cannot run here"):
        choose_operators("cpp")


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


@pytest.mark.parametrize("damage", [lambda whole: whole[:4000] + b"\0" * 64 + whole[4064:], lambda whole: b""])
def test_a_damaged_library_is_compiled_anew(damage, tmp_path, short_source):
    assert compiler.library().answer() == 42
    [library] = (tmp_path / "peerscale").iterdir()
    whole = library.read_bytes()
    library.unlink()  # or the library that is loaded would change
    library.write_bytes(damage(whole))
    compiler.library.cache_clear()
    assert compiler.library().answer() == 42
    assert library.read_bytes() == whole


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


def test_importing_the_operators_changes_nothing_in_torch():
    program = (
        "import torch.optim.optimizer as optimizer, peerscale.ops.backends, peerscale.ops.cross_entropy\n"
        "assert not optimizer._global_optimizer_post_hooks"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
