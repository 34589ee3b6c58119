"""Compiles `operators.cpp` on first use, and loads it.

The name of the compiled library has a hash of everything that it depends on: source, flags, compiler, OpenMP runtime
and the processor's instruction sets (different machines may share a home folder). Python calls plain C functions
through ctypes, so the source does not need torch's headers; it compiles in two seconds and loads in a millisecond.
"""

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from peerscale.files import replacing

SOURCE = Path(__file__).with_name("operators.cpp")
HEADERS = sorted(SOURCE.parent.glob("*.h"))
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared"]


HASH_BYTES = hashlib.sha256().digest_size


class CompilerError(Exception):
    """The reason, in one line, why the library cannot be compiled or loaded."""


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled `operators.cpp`; the first call compiles it. Raises `CompilerError`."""
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if compiler is None:
        raise CompilerError("no C++ compiler (c++ or g++, or another in CXX)")
    processor = instruction_sets()
    # Compilers avoid the widest vectors by default; here they are faster.
    wide = ["-mprefer-vector-width=512"] if "avx512f" in processor else []
    flags, runtime = [*FLAGS, *wide], openmp_runtime()
    command = [compiler, *flags, str(SOURCE), *runtime]
    sources = [path.read_text("utf-8") for path in (SOURCE, *HEADERS)]
    # Without the folders of checkout and environment, so that several checkouts share one library.
    parts = [*sources, compiler, *flags, *(Path(path).name for path in runtime), processor]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    path = cache_folder() / f"operators-{key[:16]}.so"
    try:
        if not is_whole(path):
            # Several processes may compile at once; each puts a complete file in place, and the last one stays.
            with replacing(path) as temporary:
                subprocess.run([*command, "-o", str(temporary)], check=True, capture_output=True, text=True)
                with temporary.open("r+b") as file:
                    file.write(hashlib.sha256(file.read()).digest())  # the loader ignores what follows the library
        return ctypes.CDLL(str(path))
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line] or error.stderr.splitlines() or ["?"]
        raise CompilerError(f"{compiler} failed: {lines[0].strip()}") from None
    except OSError as error:
        raise CompilerError(str(error)) from None


def is_whole(path: Path) -> bool:
    """Whether a compiled library is there and ends with its own hash; to load a damaged one would end the process."""
    content = path.read_bytes() if path.is_file() else b""
    return hashlib.sha256(content[:-HASH_BYTES]).digest() == content[-HASH_BYTES:]


def cache_folder() -> Path:
    """The folder of compiled libraries: `peerscale` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peerscale"


def openmp_runtime() -> list[str]:
    """The OpenMP library that torch has loaded, to link with; a different one would have its own pool of threads."""
    torch.get_num_threads()
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    loaded = re.findall(r"/\S*/lib(?:gomp|iomp5|omp)\b\S*\.so\S*", maps)
    ours = [path for path in loaded if "/torch" in path] or loaded
    return ours[:1]


def instruction_sets() -> str:
    """The description of the processor on which the effect of `-march=native` depends."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{sys.platform} {platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
