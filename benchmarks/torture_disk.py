"""Faults of the disk: an error at every write of a short run in turn, and flipped bits in every kind of file."""

import ctypes
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from broken_runs import FORK, Bench, cells, check, kept, outcome_of

from peerscale.config.schema import load
from peerscale.data.prepare import prepare
from peerscale.data.store import folder as corpus_folder
from peerscale.errors import UserError
from peerscale.model.trained import load_model
from peerscale.ops import compiler
from peerscale.records.curves import read_metrics
from peerscale.records.record import read_record
from peerscale.records.table import read_records, write_records

SOURCE = Path(__file__).with_name("fail_calls.c")
STEPS = 6
FLIPS = 300


def with_failing_calls(folder: Path) -> None:
    """Start this program again with `fail_calls.c` loaded first, if there is a compiler."""
    if hasattr(ctypes.CDLL(None), "arm"):  # started again: the processes that we start need not load it
        shutil.rmtree(Path(os.environ.pop("LD_PRELOAD")).parent)
    elif found := shutil.which("cc"):
        library = folder / "fail_calls.so"
        subprocess.run([found, "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True)
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "LD_PRELOAD": str(library)})


def io_errors(bench: Bench) -> tuple[int, str, int]:
    """EIO at every write of a run in turn"""
    if not hasattr(own := ctypes.CDLL(None), "arm"):
        return 0, "skipped: no C compiler (cc)", 0
    whole = bench.cell("io-whole", STEPS)
    count = FORK.Value("l", 0)

    def counting() -> None:
        own.arm(str(bench.folder / "io-whole").encode(), 0, 0)
        leave = os._exit

        def noted(code: int) -> None:
            count.value = own.counted()
            leave(code)

        os._exit = noted

    check(bench.run(whole, counting)[0] == 0, "the whole run does not end")
    unbroken, told, lost = kept(bench.folder / "io-whole" / "single"), Counter[str](), 0
    check(unbroken and count.value > 20, f"only {count.value} writes")
    writes = range(1, count.value + 1, bench.every)
    for at in writes:
        for lasting in (0, 1):
            runs = f"io-{at}-{lasting}"
            arm = lambda runs=runs, at=at, lasting=lasting: own.arm(str(bench.folder / runs).encode(), at, lasting)  # noqa: E731
            code, printed = bench.run(bench.cell(runs, STEPS), arm)
            told[outcome_of(code, printed, (0, 2, 3))] += 1
            again, printed = bench.run(bench.cell(runs, STEPS))
            told[outcome_of(again, printed, (0,), good="")] += 1
            lost += len(unbroken - kept(bench.folder / runs / "single"))
            shutil.rmtree(bench.folder / runs, ignore_errors=True)
    return bench.told(2 * len(writes), told, lost)


def flipped_bits(bench: Bench) -> tuple[int, str, int]:
    """a flipped bit in a file that we read"""
    bench.finish(bench.cell("bits"))
    (cell,) = cells(bench.folder / "bits" / "single")
    config = load(bench.cell("bits")).data
    study, corpus = bench.folder / "bits-study", corpus_folder(config)
    study.mkdir()
    write_records(study, read_records(cell.parent))
    compiler.SOURCE, compiler.HEADERS = bench.folder / "short.cpp", []
    compiler.SOURCE.write_text('extern "C" int answer() { return 42; }')
    os.environ["XDG_CACHE_HOME"] = str(bench.folder / "cache")
    compiler.library.cache_clear()
    compiler.library()
    (library,) = (bench.folder / "cache" / "peerscale").iterdir()
    (checkpoint,) = (cell / "checkpoints").glob("*.ckpt")

    def model() -> Any:
        found = load_model(cell)
        return str(found), {name: value.numpy().tobytes() for name, value in found.state_dict().items()}

    def tokens() -> Any:
        found = prepare(config)
        return found.manifest, [found.tokens(split).tobytes() for split in found.manifest.splits]

    read: dict[Path, Callable[[], Any]] = {
        cell / "record.json": lambda: read_record(cell),
        cell / "metrics.jsonl": lambda: [{**row, "step": row["step"]} for row in read_metrics(cell)],
        cell / "config.yaml": model,
        checkpoint: model,
        study / "records.jsonl": lambda: read_records(study),
        study / "sequence_losses.npz": lambda: read_records(study),
        corpus / "manifest.json": tokens,
        corpus / "train.bin": tokens,
        corpus / "tokenizer.json": tokens,
        library: lambda: in_process(lambda: compiler.library.cache_clear() or compiler.library().answer()),
    }
    told, wrong = Counter[str](), Counter[str]()
    for path, reader in read.items():
        whole, expected = path.read_bytes(), reader()
        for _ in range(max(1, FLIPS // len(read) // bench.every)):
            bit = bench.rng.randrange(8 * len(whole))
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            path.unlink()  # or a library that is loaded would change
            path.write_bytes(damaged)
            try:
                came = "survived" if reader() == expected else "silently wrong"
            except UserError:
                came = "survived"
            except Exception as error:
                came = "tracebacks"
                print(f"{path.name}: {type(error).__name__}: {error}", file=sys.stderr)
            told[came] += 1
            wrong[path.name] += came == "silently wrong"
            path.parent.mkdir(exist_ok=True)
            path.unlink(missing_ok=True)
            path.write_bytes(whole)
    if named := +wrong:
        print(f"silently wrong: {dict(named)}", file=sys.stderr)
    return bench.told(told.total(), told, 0)


def in_process(act: Callable[[], int]) -> int:
    """The result of a function that might end its process."""
    process = FORK.Process(target=lambda: os._exit(act()))
    process.start()
    process.join(60)
    if process.exitcode is None or process.exitcode < 0:
        process.kill()
        raise RuntimeError(f"ended by {process.exitcode}")
    return process.exitcode


torch.set_num_threads(1)
