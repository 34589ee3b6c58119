"""Break a small study in every way that a machine or its user can, and count what was lost.

    .venv/bin/python benchmarks/torture.py [FAULT ...] [--kills 20] [--seed 0]

Prints a table: fault, times tried, lost records, seconds, outcome. Each broken run is continued to its end and compared
with an unbroken one. A lost record is a row of metrics, the result of a cell, or a finished cell's record file that
only the unbroken run has. Exit code 1 if any is lost or an outcome is not the promised one.
"""

import argparse
import contextlib
import io
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from broken_runs import FORK, HANGS_S, STEPS, Bench, Wrong, at_step, cells, check, files, kept, write_text
from slurm_time_limit import in_slices
from torture_disk import flipped_bits, io_errors, with_failing_calls
from torture_inputs import generated_inputs

import peerscale.train.cell as training
from peerscale.config.schema import load
from peerscale.data.prepare import prepare
from peerscale.records.curves import read_metrics
from peerscale.records.record import SCHEMA_VERSION, Status, read_record
from peerscale.records.table import read_records, runs_table
from peerscale.stats.curve import usable

Outcome = tuple[int, str, int]
"""Times tried, what came of it, lost records."""


def killed(bench: Bench) -> Outcome:
    """SIGKILL at random moments"""
    words, kills, ended = bench.cell("killed"), 0, 0
    while kills < bench.kills:
        process = bench.start(words)
        process.join(bench.rng.uniform(0.0, bench.seconds / 3))
        if process.is_alive():
            process.kill()
            kills += 1
        process.join()
        if process.exitcode == 0:  # before its time: break another one
            ended += 1
            (bench.folder / "killed").rename(bench.folder / f"killed-{ended}")
    bench.finish(words)
    lost = sum(bench.lost(name) for name in ("killed", *(f"killed-{i + 1}" for i in range(ended))))
    check(not list((bench.folder / "killed").rglob(".*.????????")), "half-written files stay")
    return kills, f"{ended + 1} cells, bit-identical to the unbroken one", lost


def two_sweeps(bench: Bench) -> Outcome:
    """two sweeps at once on one folder"""
    times, lost = 3, 0
    for i in range(times):
        runs, started = f"two-{i}", bench.folder / f"two-{i}.log"

        def note(started: Path = started) -> None:
            original = training.CellRun.train

            def noted(self: training.CellRun) -> Status:
                with started.open("a") as file:
                    file.write(f"{self.cell.name}\n")
                return original(self)

            training.CellRun.train = noted

        words = bench.study(runs)
        sweeps = [bench.start(words, note) for _ in range(2)]
        for sweep in sweeps:
            sweep.join()
        check([sweep.exitcode for sweep in sweeps] == [0, 0], (bench.folder / "log").read_text()[-300:])
        names = started.read_text().split()
        check(len(names) == len({*names}), f"{len(names) - len({*names})} cells ran twice")
        lost += 6 - sum(record.status is Status.DONE for record in read_records(bench.folder / runs / "toy"))
    return times, "each of 6 cells ran once, all done", lost


def disk_full(bench: Bench, what: str, limit: int, **changed: str) -> Outcome:
    words = [*bench.cell(f"full-{what}"), *(f"trainer.{key}={value}" for key, value in changed.items())]

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))  # any file: write fails as if full

    code, printed = bench.run(words, fill)
    check(code in (2, 3) and "Traceback" not in printed, f"exit code {code}: {printed[-300:]}")
    check("file too large" in printed.lower(), printed[-300:])
    check(not list((bench.folder / f"full-{what}").rglob("checkpoints/.*")), "half a checkpoint stays")
    bench.finish(bench.cell(f"full-{what}"))
    return 1, f"exit code {code}, one line; with room again it went on", bench.lost(f"full-{what}")


def full_checkpoint(bench: Bench) -> Outcome:
    """disk full while checkpointing"""
    return disk_full(bench, "checkpoint", 20_000)


def full_metrics(bench: Bench) -> Outcome:
    """disk full while writing metrics"""
    return disk_full(bench, "metrics", 10_000, checkpoint_every_steps="1000")


def nan_loss(bench: Bench) -> Outcome:
    """a loss that is no number"""
    words = bench.study(
        "nan", ", method_axes: {peer: {optim.lr: [1e30]}}", optim__warmup_fraction=0.0, optim__lr_rule="constant"
    )
    code, printed = bench.run(words)
    check(code == 3, f"exit code {code}: {printed[-300:]}")
    folder = bench.folder / "nan" / "toy"
    records = {record.cell: record for record in read_records(folder)}
    by_status = [
        sum(record.status is status for record in records.values()) for status in (Status.DONE, Status.DIVERGED)
    ]
    check(by_status == [3, 3], f"{by_status[0]} cells done, {by_status[1]} diverged")
    table = runs_table(records.values())
    check(table[~usable(table)]["reason"].str.contains("the training loss is").all(), "reasons are missing")
    check(usable(table).sum() == 3, "the fit takes diverged cells")
    before = files(folder)
    _, printed = bench.run(words)
    check(files(folder) == before, "diverged cells were run again")
    return 3, "diverged with a reason, the others done, none run again", 6 - len(records)


def raising(bench: Bench) -> Outcome:
    """a cell that raises"""
    words = bench.study("raising")

    def fail() -> None:
        raise RuntimeError("out of something")

    code, printed = bench.run(words, lambda: at_step(5, fail, "peer"))
    check(code == 3 and "3 of 6 cells failed" in printed, f"exit code {code}: {printed[-300:]}")
    folder = bench.folder / "raising" / "toy"
    done = {path: text for path, text in files(folder).items() if "dense" in str(path)}
    failed = [record for record in read_records(folder) if record.status is Status.FAILED]
    check(len(failed) == 3 and all(r.reason == "RuntimeError: out of something" for r in failed), "reasons are missing")
    bench.finish(words)
    lost = 6 - sum(record.status is Status.DONE for record in read_records(folder))
    lost += sum(files(folder)[path] != text for path, text in done.items())
    return 3, "recorded with its traceback, the others done; the same command went on", lost


def old_schema(bench: Bench) -> Outcome:
    """results of an older schema"""
    words = bench.cell("unbroken")
    (path,) = files(bench.folder / "unbroken")
    text = path.read_text()
    older = text.replace(f'"schema_version": {SCHEMA_VERSION}', '"schema_version": 0')
    check(older != text, "the record names no schema")
    path.write_text(older)
    code, printed = bench.run(words)
    check(code == 2 and f"{path}: schema version 0" in printed, f"exit code {code}: {printed[-300:]}")
    lost = int(path.read_text() != older)
    path.write_text(text)
    return 1, "refused by name, left as it is", lost + bench.lost("unbroken")


def changed_config(bench: Bench) -> Outcome:
    """a configuration changed under its run"""
    words = bench.study("changed")
    bench.finish(words)
    before = files(bench.folder / "changed")
    code, printed = bench.run(bench.study("changed", optim__weight_decay=0.5))
    check(code == 2 and "another configuration: optim.weight_decay 0.1 -> 0.5" in printed, printed[-300:])
    after = files(bench.folder / "changed")
    return 1, "refused, the key named", sum(after.get(path) != text for path, text in before.items())


def ctrl_c(bench: Bench) -> Outcome:
    """Ctrl-C"""
    words, times = bench.cell("ctrl-c"), 5
    for i in range(times):
        step = (i + 1) * STEPS // (times + 1)
        code, printed = bench.run(words, lambda step=step: at_step(step, lambda: os.kill(os.getpid(), signal.SIGINT)))
        check(code == 130 and "the same command goes on" in printed, f"exit code {code}: {printed[-300:]}")
        check("Traceback" not in printed, printed[-300:])
    bench.finish(words)
    return times, "exit code 130, says how to go on; bit-identical", bench.lost("ctrl-c")


def terminated(bench: Bench) -> Outcome:
    """SIGTERM to a sweep of two workers"""
    words, times, lost = ["--launcher", "joblib", "--jobs", "2"], 3, 0
    bench.finish(bench.study("whole"))
    for i in range(times):
        runs = f"terminated-{i}"
        process = bench.start([*bench.study(runs), *words], lambda runs=runs: os.environ.update(BROKEN_RUN=runs))
        while not any(path.stat().st_size for path in (bench.folder / runs).rglob("metrics.jsonl")):
            check(process.is_alive(), "the sweep ended before it was terminated")
            time.sleep(0.05)
        process.terminate()
        process.join()
        check(process.exitcode == 130, f"exit code {process.exitcode}")
        time.sleep(1)
        left = _processes(runs)
        check(not left, f"processes stay: {left}")
        bench.finish(bench.study(runs))
        lost += len(kept(bench.folder / "whole" / "toy") ^ kept(bench.folder / runs / "toy"))
    return times, "exit code 130, no process stays; bit-identical", lost


def killed_worker(bench: Bench) -> Outcome:
    """SIGKILL of one of a sweep's two workers"""
    words, times, lost = ["--launcher", "joblib", "--jobs", "2"], max(1, 10 // bench.every), 0
    bench.finish(bench.study("whole-of-workers"))
    for i in range(times):
        runs = f"worker-{i}"
        process = bench.start([*bench.study(runs), *words], lambda runs=runs: os.environ.update(BROKEN_RUN=runs))
        time.sleep(bench.rng.uniform(0.0, bench.seconds / 3))
        while not (workers := [pid for pid in _processes(runs) if pid != process.pid]):
            check(process.is_alive(), "the sweep ended before a worker was killed")
            time.sleep(0.05)
        os.kill(bench.rng.choice(workers), signal.SIGKILL)
        process.join()
        check(process.exitcode == 0, f"exit code {process.exitcode}: {(bench.folder / 'log').read_text()[-300:]}")
        lost += len(kept(bench.folder / "whole-of-workers" / "toy") - kept(bench.folder / runs / "toy"))
    return times, "its cell tried again, all done; bit-identical", lost


def killed_parent(bench: Bench) -> Outcome:
    """SIGKILL of a sweep that has two workers"""
    words, times, lost = ["--launcher", "joblib", "--jobs", "2"], max(1, 10 // bench.every), 0
    bench.finish(bench.study("whole-of-parents"))
    for i in range(times):
        runs = f"parent-{i}"
        process = bench.start([*bench.study(runs), *words], lambda runs=runs: os.environ.update(BROKEN_RUN=runs))
        process.join(bench.rng.uniform(0.5, bench.seconds))
        process.kill()
        process.join()
        until = time.monotonic() + 10
        while _processes(runs) and time.monotonic() < until:
            time.sleep(0.1)
        check(not _processes(runs), "workers go on")
        bench.finish(bench.study(runs))
        lost += len(kept(bench.folder / "whole-of-parents" / "toy") - kept(bench.folder / runs / "toy"))
    return times, "its workers end, the same command goes on; bit-identical", lost


def killed_wandb(bench: Bench) -> Outcome:
    """SIGKILL of the W&B service"""
    times, lost, hit = max(1, 10 // bench.every), 0, 0
    for i in range(times):
        runs = f"wandb-{i}"
        words = [*bench.cell(runs), "tracking=offline"]
        process = bench.start(words, lambda runs=runs: os.environ.update(BROKEN_RUN=runs))
        while process.is_alive() and not (services := [pid for pid in _processes(runs) if pid != process.pid]):
            time.sleep(0.02)
        process.join(bench.rng.uniform(0.0, bench.seconds / 2))
        for pid in services:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                hit += 1
        process.join(HANGS_S)
        printed = (bench.folder / "log").read_text()
        check(process.exitcode == 0 and "Traceback" not in printed, f"exit code {process.exitcode}: {printed[-300:]}")
        lost += bench.lost(runs)
    return times, f"{hit} killed while they were there; the run ends, bit-identical", lost


def _processes(runs: str) -> list[int]:
    """The processes of the sweep whose environment says BROKEN_RUN=runs."""
    return [
        int(path.parent.name) for path in Path("/proc").glob("[0-9]*/environ") if _holds(path, f"BROKEN_RUN={runs}")
    ]


def _holds(path: Path, text: str) -> bool:
    try:
        return text.encode() in path.read_bytes().split(b"\0")
    except OSError:  # it has ended, or is another user's
        return False


def time_limit(bench: Bench) -> Outcome:
    """a Slurm time limit shorter than the cell"""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return in_slices(bench.folder / "slurm")


def clock_back(bench: Bench) -> Outcome:
    """the clock set back an hour, again and again"""

    def set_back() -> None:
        real, calls = time.time, iter(range(10**9))
        time.time = lambda: real() - 3600.0 * next(calls)

    code, printed = bench.run(bench.interrupted("clock"), set_back)
    check(code == 0, printed[-300:])
    (cell,) = cells(bench.folder / "clock" / "single")
    record = read_record(cell)
    check(record and all(value > 0 for value in record.timing.values()), "times are negative")
    check(all(row["tokens_per_s"] > 0 for row in read_metrics(cell)), "speeds are negative")
    return 1, "no negative time; bit-identical", bench.lost("clock")


def damaged(bench: Bench) -> Outcome:
    """a damaged newest checkpoint"""
    ways: dict[str, Callable[[bytes], bytes]] = {
        "truncated": lambda content: content[: len(content) // 2],
        "empty": lambda content: b"",
        "bit": lambda content: (
            content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 4]) + content[len(content) // 2 + 1 :]
        ),
    }
    lost = 0
    for way, damage in ways.items():
        words = bench.interrupted(f"damaged-{way}")
        (cell,) = cells(bench.folder / f"damaged-{way}" / "single")
        before, newest = sorted((cell / "checkpoints").glob("*.ckpt"))
        newest.write_bytes(damage(newest.read_bytes()))
        printed = bench.finish(words)
        check(f"{newest} cannot be read" in printed and f"continuing from {before.name}" in printed, printed[-300:])
        lost += bench.lost(f"damaged-{way}")
    return len(ways), "the one before taken, with a notice; bit-identical", lost


def poisoned(bench: Bench) -> Outcome:
    """checkpoints that hold code"""
    words = bench.interrupted("poisoned")
    (cell,) = cells(bench.folder / "poisoned" / "single")
    sign = bench.folder / "executed"
    for path in (cell / "checkpoints").glob("*.ckpt"):
        torch.save({"global_step": _Code(sign)}, path)
    bench.finish(words)
    check(not sign.exists(), "the code in a checkpoint was executed")
    return 2, "not executed, the cell begun anew", bench.lost("poisoned")


class _Code:
    """Pickles as a call that leaves a sign."""

    def __init__(self, sign: Path) -> None:
        self.sign = sign

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.sign),))


FAULTS = (
    killed, two_sweeps, full_checkpoint, full_metrics, nan_loss, raising, old_schema, changed_config, ctrl_c,
    terminated, killed_worker, killed_parent, killed_wandb, clock_back, damaged, poisoned, io_errors, flipped_bits,
    generated_inputs, time_limit,
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=", ".join(fault.__name__ for fault in FAULTS))
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs (20)")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="try one of N of the many (1)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    options = parser.parse_args()
    if strangers := {*options.faults} - {fault.__name__ for fault in FAULTS}:
        parser.error(f"no fault {min(strangers)}")
    failed = 0
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        with_failing_calls(Path(folder))
        bench = Bench(folder=Path(folder), kills=options.kills, every=options.every, rng=random.Random(options.seed))
        write_text(bench.folder / "text.txt")
        maker = FORK.Process(target=lambda: prepare(load(bench.cell("unbroken")).data))
        maker.start()
        maker.join()
        begun = time.monotonic()
        bench.finish(bench.cell("unbroken"))
        bench.seconds = time.monotonic() - begun
        bench.unbroken = kept(bench.folder / "unbroken" / "single")
        print(f"{'fault':<44}{'tried':>6}{'lost':>6}{'s':>6}  outcome", flush=True)
        for fault in FAULTS:
            if options.faults and fault.__name__ not in options.faults:
                continue
            begun = time.monotonic()
            try:
                tried, outcome, lost = fault(bench)
                count = str(lost)
                if lost:
                    outcome, failed = "FAILED: not what the unbroken run holds", failed + 1
            except Wrong as error:
                tried, outcome, count = 1, f"FAILED: {error}", "?"
                failed += 1
            row = f"{fault.__doc__:<44}{tried:>6}{count:>6}{time.monotonic() - begun:>6.0f}  {outcome}"
            print(row, flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
