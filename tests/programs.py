"""The programs that a user calls, run inside this process or as one of their own: exit code, and what they print."""

import functools
import importlib
import importlib.util
import io
import shlex
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from types import ModuleType
from unittest.mock import patch

from peerscale.errors import exit_code
from peerscale.files import ROOT

MODULES = {
    "train": "peerscale.train.run",
    "launch": "peerscale.launch.run",
    "overview": "peerscale.launch.overview",
    "prepare": "peerscale.data.prepare",
    "repeat": "peerscale.launch.repeat",
}
SCRIPTS = ("collect", "compare", "figures", "fit", "publish", "restore", "standing")


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@functools.cache
def program(name: str) -> ModuleType:
    """A module of the package, or a script of analysis/."""
    if name in MODULES:
        return importlib.import_module(MODULES[name])
    spec = importlib.util.spec_from_file_location(f"analysis_{name}", ROOT / "analysis" / f"{name}.py")
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call_as_process(line: str) -> Result:
    """Run `NAME WORD ...` in a process of its own."""
    name, *words = shlex.split(line)
    start = ["-m", MODULES[name].removesuffix(".run")] if name in MODULES else [str(ROOT / "analysis" / f"{name}.py")]
    ran = subprocess.run([sys.executable, *start, *words], cwd=ROOT, capture_output=True, text=True, timeout=240)
    return Result(ran.returncode, ran.stdout, ran.stderr)


def call(line: str) -> Result:
    """Run `NAME WORD ...` as `sys.exit(exit_code(main))` would."""
    name, *words = shlex.split(line)
    main: Callable[[], int | None] = program(name).main
    out, err = io.StringIO(), io.StringIO()
    with patch.object(sys, "argv", [f"{name}.py", *words]), redirect_stdout(out), redirect_stderr(err):
        try:
            code = exit_code(main)
        except SystemExit as stopped:  # argparse, and `train` where it leaves Hydra
            code = stopped.code if isinstance(stopped.code, int) else 1
    return Result(code, out.getvalue(), err.getvalue())
