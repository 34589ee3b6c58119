"""Generated studies and overrides: each is refused in one line, or planned with every key that it gives."""

import contextlib
import io
import random
import signal
import sys
from collections import Counter
from typing import Any

import yaml
from broken_runs import Bench

from peerscale.config.compose import leaves, value_at
from peerscale.config.schema import to_dict
from peerscale.errors import UserError
from peerscale.plan.cell import Cell
from peerscale.plan.cells import planned_cells

INPUTS = 600
HANGS_S = 30
ODD: tuple[Any, ...] = (
    None, True, "", "x", "../x", "${seed}", "${", "a b", "ü", 0, -1, 1, 3, 2**31, 10**9, 10**30, 0.5, 1e-300, 1e30,
    float("nan"), float("inf"), [], [1], [1, [2]], {}, {"a": 1}, "1e9", "null", "[1", "???", "!!python/name:os.system",
)  # fmt: skip
USUAL: dict[str, tuple[Any, ...]] = {
    "n_layers": (2, 4, 6), "head_dim": (4, 8), "context": (16, 64), "batch_sequences": (8, 32), "precision": ("bf16",),
    "optim.lr": (0.01,), "optim.lr_rule": ("constant",), "optim.weight_decay": (0.0, 0.2), "replaced": ("all", [1]),
    "trainer.threads": (1, 2), "trainer.micro_batches": (2,), "data.vocab_size": (512,), "data.max_epochs": (2.0,),
    "data.name": ("verse",), "data.directory": ("data",), "min_steps": (1,), "tracking.project": ("mine",),
    "ffn.variant": ("wide",), "trainer.log_every_steps": (5,), "routing_group_sequences": (4,),
}  # fmt: skip
"""Keys, and values that they may have."""
SWEEP: dict[str, tuple[Any, ...]] = {
    "methods": (["dense"], ["peer", "dense"], ["pkm"], ["moe"], "dense", ["nosuch"]), "seeds": ([0], [0, 1], 3),
    "axes": ({"optim.lr": [0.01, 0.02]}, {"ffn.top_k": [4]}, {"seed": [1]}), "baseline": ("dense", "pkm"),
    "min_sizes": (1, 4), "method_axes": ({"peer": {"ffn.n_experts": [256]}},), "held_out": ([8], [9]),
}  # fmt: skip


def generated_inputs(bench: Bench) -> tuple[int, str, int]:
    """generated studies and overrides"""
    told, planned, path = Counter[str](), 0, bench.folder / "generated.yaml"
    signal.signal(signal.SIGALRM, _hang)
    for _ in range(INPUTS // bench.every):
        study, overrides = generated(bench.rng)
        path.write_text(yaml.safe_dump(study, allow_unicode=True), encoding="utf-8")
        signal.alarm(HANGS_S)
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                missing = missing_keys(study, overrides, planned_cells(path, overrides))
            came, what, planned = "silently wrong" if missing else "survived", f"without effect: {missing}", planned + 1
        except UserError as error:
            came, what = "survived" if "\n" not in str(error) else "tracebacks", str(error)
        except TimeoutError as error:
            came, what = "hangs", repr(error)
        except Exception as error:
            came, what = "tracebacks", repr(error)
        signal.alarm(0)
        told[came] += 1
        if came != "survived":
            print(f"{came}: {what}\n  {study}\n  {overrides}", file=sys.stderr)
    tried, text, lost = bench.told(told.total(), told, 0)
    return tried, f"{text}; {planned} planned, the others refused", lost


def _hang(*_: object) -> None:
    raise TimeoutError


def generated(rng: random.Random) -> tuple[dict[str, Any], list[str]]:
    """A study's tree and overrides: mostly usual values, some odd ones, and now and then a misspelt key."""

    def value(usual: tuple[Any, ...]) -> Any:
        return rng.choice(ODD) if rng.random() < 0.04 else rng.choice(usual)

    row = {"budget": value((1e10, 3e11)), "d_model": value(([8, 16], 32, [16]))}
    row |= {key: value((4, [4, 8])) for key in ("head_dim", "n_layers") if rng.random() < 0.1}
    sweep = {"methods": ["dense"], "grid": [row] * rng.choice((1, 1, 2))}
    sweep |= {key: value(usual) for key, usual in SWEEP.items() if rng.random() < 0.25}
    study: dict[str, Any] = {"sweep": sweep}
    for key in rng.sample(sorted(USUAL), rng.randint(0, 3)):
        *section, name = (key if rng.random() < 0.95 else key[:-1]).split(".")
        tree = study.setdefault(section[0], {}) if section else study
        tree[name] = value(USUAL[key])
    chosen = rng.sample(sorted(USUAL), rng.choice((0, 0, 1, 2)))
    overrides = [f"{rng.choice(('', '', '+', '++'))}{key}={value(USUAL[key])}" for key in chosen]
    return study, overrides + ["sweep.budgets=[1e10]"] * (rng.random() < 0.1)


def missing_keys(study: dict[str, Any], overrides: list[str], cells: list[Cell]) -> list[str]:
    """Keys of a study's file with a value that no cell has, other than those that an override changes."""
    axes = study["sweep"].get("axes") or {}
    given = {key: [value] for key, value in leaves({**study, "sweep": {}})} | axes
    changed = {word.lstrip("+").partition("=")[0] for word in overrides}
    trees = [to_dict(cell.config) for cell in cells]
    return [
        key
        for key, values in given.items()
        for value in values
        if key not in changed and value != "${seed}" and not any(_same(value_at(tree, key), value) for tree in trees)
    ]


def _same(found: Any, value: Any) -> bool:
    """Whether a key has the value that was given; `"1e9"` is a number to the schema."""
    return found == (float(value) if isinstance(value, str) and isinstance(found, int | float) else value)
