"""Runs of a small study to be broken: processes of their own, changed from inside, compared with an unbroken one.

They are forked from this process, so that torch is imported once; the signals are real.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import peerscale.launch.run as launch
import peerscale.train.run as train
from peerscale.config.schema import load
from peerscale.errors import exit_code
from peerscale.plan.cost import cost
from peerscale.records.curves import read_metrics
from peerscale.records.record import Status, read_record
from peerscale.train.module import LanguageModel

FORK = multiprocessing.get_context("fork")
STEPS = 120
Change = Callable[[], None]
Kept = set[tuple[Any, ...]]


HANGS_S, HUNG = 120, -1000
"""Seconds after which a short run hangs, and the exit code that it is given then."""

OUTCOMES = ("survived", "silently wrong", "tracebacks", "hangs")


def outcome_of(code: int, printed: str, promised: tuple[int, ...], good: str = "survived") -> str:
    """The outcome of a broken run, which may have one of the promised exit codes."""
    if code == HUNG:
        return "hangs"
    if "Traceback" in printed or code not in promised:
        print(f"exit code {code}: {printed[-500:]}", file=sys.stderr)
        return "tracebacks"
    return good


class Wrong(Exception):
    """An outcome that is not the one promised."""


def check(truth: object, what: str) -> None:
    if not truth:
        raise Wrong(what)


@dataclass
class Bench:
    """A corpus and the runs of one fault, in a folder that is removed at the end."""

    folder: Path
    kills: int
    every: int
    """Only every so many of the errors, flipped bits and inputs, for a quick look."""
    rng: random.Random
    unbroken: Kept = field(default_factory=set)
    seconds: float = 0.0
    """That the unbroken cell takes."""

    def settings(self, runs: str) -> dict[str, Any]:
        """Keys of the cell that is broken: PEER with row-sparse AdamW, a checkpoint every third step."""
        return {
            "data.path": self.folder / "text.txt", "data.directory": self.folder / "data", "data.vocab_size": 300,
            "data.evaluation.validation": 512, "data.max_epochs": 100, "n_layers": 2, "batch_sequences": 16,
            "context": 8, "min_steps": 4, "trainer.runs_directory": self.folder / runs, "trainer.kernel": "torch",
            "trainer.log_every_steps": 1, "trainer.checkpoint_every_steps": 3, "trainer.keep_checkpoint": "true",
        }  # fmt: skip

    def cell(self, runs: str, steps: int = STEPS) -> list[str]:
        groups = ["data=text", "d_model=8", "ffn=peer", "optim=row_sparse_adamw", "tracking=disabled"]
        words = [*groups, *(f"{key}={value}" for key, value in self.settings(runs).items())]
        return [*words, f"budget={flops(words, steps):.10g}"]

    def study(self, runs: str, sweep: str = "", **changed: Any) -> list[str]:
        """A study of six cells, written down; the words that run it."""
        settings = {key: value for key, value in self.settings(runs).items() if not key.startswith("data.evaluation")}
        settings |= {key.replace("__", "."): value for key, value in changed.items()}
        lines = [
            "defaults: [override data: text, override tracking: disabled]",
            f"sweep: {{methods: [dense, peer], grid: [{{budget: 2e8, d_model: [8, 12, 16]}}], min_sizes: 1{sweep}}}",
        ]
        for group in ("data", "trainer", "optim"):
            inner = [f"{k.partition('.')[2]}: {v}" for k, v in settings.items() if k.startswith(f"{group}.")]
            inner += ["evaluation: {validation: 512}"] if group == "data" else []
            lines.append(f"{group}: {{{', '.join(inner)}}}")
        lines += [f"{key}: {value}" for key, value in settings.items() if "." not in key]
        (self.folder / "toy.yaml").write_text("\n".join(lines) + "\n")
        return [str(self.folder / "toy.yaml")]

    def start(self, words: list[str], change: Change | None = None) -> Any:
        process = FORK.Process(target=_run, args=(words, self.folder / "log", change))
        process.start()
        return process

    def run(self, words: list[str], change: Change | None = None) -> tuple[int, str]:
        """Exit code, and what was printed."""
        (self.folder / "log").unlink(missing_ok=True)
        process = self.start(words, change)
        process.join(HANGS_S)
        if process.is_alive():
            process.kill()
            process.join()
            return HUNG, ""
        return process.exitcode, (self.folder / "log").read_text()

    def told(self, tried: int, outcomes: Counter[str], lost: int) -> tuple[int, str, int]:
        """The row of a fault that was tried many times; raises `Wrong` if one outcome was bad."""
        text = ", ".join(f"{outcomes[name]} {name}" for name in OUTCOMES)
        check(not any(outcomes[name] for name in OUTCOMES[1:]), f"{text}; {lost} lost of {tried}")
        return tried, text, lost

    def finish(self, words: list[str]) -> str:
        """The same command again, which must end well."""
        code, printed = self.run(words)
        check(code == 0, f"exit code {code}: {printed[-300:]}")
        return printed

    def lost(self, runs: str) -> int:
        """Of what the unbroken cell holds, and rows that stand twice."""
        rows = [row["step"] for cell in cells(self.folder / runs / "single") for row in read_metrics(cell)]
        check(len(rows) == len({*rows}), "rows of metrics stand twice")
        return len(self.unbroken - kept(self.folder / runs / "single"))

    def interrupted(self, runs: str, step: int = 60) -> list[str]:
        """A cell killed at a step, and the words that go on with it."""

        def kill() -> None:
            at_step(step, lambda: os.kill(os.getpid(), signal.SIGKILL))

        code, printed = self.run(self.cell(runs), kill)
        check(code == -signal.SIGKILL, f"not killed: {code} {printed[-300:]}")
        return self.cell(runs)


def _run(words: list[str], log: Path, change: Change | None) -> None:
    with log.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # heard, even where a shell has it ignored
        if change:
            change()
        sys.argv = ["train", *words]
        program = launch if words[0].endswith(".yaml") else train
        try:
            code = exit_code(program.main)
        except SystemExit as end:  # how `train` leaves Hydra
            code = end.code
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def flops(words: list[str], steps: int) -> float:
    config = load([*words, "budget=1e9"])
    return cost(config).flops_per_token * config.tokens_per_step * steps


def at_step(step: int, act: Callable[[], object], method: str = "") -> None:
    """In this process `act` before a training step, counted from 0 in each cell, of one method or all."""
    original = LanguageModel.training_step

    def training_step(self: LanguageModel, tokens: torch.Tensor, batch_idx: int) -> dict[str, torch.Tensor]:
        if batch_idx == step and method in ("", self.config.ffn.method):
            act()
        return original(self, tokens, batch_idx)

    LanguageModel.training_step = training_step


def cells(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("*/record.json"))


def kept(folder: Path) -> Kept:
    """Rows of metrics, results and final weights, without what depends on the clock."""
    found: Kept = set()
    for cell in cells(folder):
        found |= {(cell.name, row["step"], row["loss"], row["lr"]) for row in read_metrics(cell)}
        record = read_record(cell)
        if record is None or record.status is not Status.DONE:
            continue
        found.add((cell.name, json.dumps(record.evaluation), json.dumps(record.sequence_losses)))
        for checkpoint in sorted((cell / "checkpoints").glob("step-*.ckpt"))[-1:]:
            state = torch.load(checkpoint, weights_only=True)
            tensors = [*state["state_dict"].items(), *_tensors(state["optimizer_states"])]
            found |= {(cell.name, name, value.flatten().double().numpy().tobytes()) for name, value in tensors}
    return found


def _tensors(tree: Any, name: str = "optimizer") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(tree, torch.Tensor):
        yield name, tree
    elif isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _tensors(value, f"{name}.{key}")


def files(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """The records, when they were written and what they hold."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("record.json")}


def write_text(path: Path) -> None:
    """Words in random order, 250 kB."""
    rng = random.Random(0)
    words = [f"{a}{b}" for a in ("ba", "ke", "li", "mo", "nu", "ra") for b in ("", "n", "st", "lly", "rk")]
    path.write_text("\n".join(" ".join(rng.choices(words, k=6)) for _ in range(9000)))
