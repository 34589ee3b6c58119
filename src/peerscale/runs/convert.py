"""Convert records of an earlier peerscale to the current schema; no number changes.

python -m peerscale.runs.convert [FOLDER ...]

Schema 1 stored a cell's axes only in its name, and hashed the names of rules where schema 2 hashes their results. The
table beside a study's records is written again from the converted records.
"""

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from peerscale.cell_names import axes_label
from peerscale.config import Config, parse_config
from peerscale.errors import ArgumentParser, UserError, exit_code
from peerscale.files import write_text
from peerscale.layers.registry import parse_layer
from peerscale.runs.fingerprint import NAMES, fingerprint, remove_key
from peerscale.runs.record import RECORD, SCHEMA_VERSION, SET_ASIDE, parse_record
from peerscale.runs.study import RESULTS, RUNS
from peerscale.runs.table import runs_table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m peerscale.runs.convert", description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, default=[RUNS, RESULTS], help="default: runs and results")
    folders = parser.parse_args(arguments).folders
    if missing := [folder for folder in folders if folder not in (RUNS, RESULTS) and not folder.is_dir()]:
        raise UserError(f"{missing[0]} is not a folder")
    n_converted = 0
    for folder in folders:
        for path in sorted([*folder.rglob(RECORD), *folder.rglob("records.jsonl")]):
            if not path.parent.name.endswith(SET_ASIDE) and (trees := _converted(path)):
                records = [parse_record(tree, f"{path}:{number}") for number, tree in enumerate(trees, 1)]
                indent = 1 if path.name == RECORD else None
                if path.name != RECORD:
                    write_text(path.with_name("runs.csv"), runs_table(records).to_csv(index=False))
                write_text(path, "".join(json.dumps(tree, indent=indent) + "\n" for tree in trees))
                n_converted += 1
    print(f"{n_converted} files converted to schema version {SCHEMA_VERSION}")
    return 0


def _converted(path: Path) -> list[dict[str, Any]]:
    """The records of a file, converted; empty if they have the current schema already."""
    text = path.read_text(encoding="utf-8")
    try:
        trees = [json.loads(part) for part in ([text] if path.name == RECORD else text.splitlines())]
    except ValueError as error:
        print(f"notice: {path} is not JSON ({error}): the file is left as it is", file=sys.stderr)
        return []
    if not any(isinstance(tree, dict) and tree.get("schema_version") == 1 for tree in trees):
        return []
    return [record_of_schema_1(tree) if tree["schema_version"] == 1 else tree for tree in trees]


def record_of_schema_1(old: Mapping[str, Any]) -> dict[str, Any]:
    """A record of schema 2 with the numbers of a record of schema 1."""
    science, plan = old["science"], dict(old["plan"])
    axes = axes_of_name(old["cell"], science)
    table_lr, lr, size = plan.pop("table_lr"), plan.pop("lr"), plan.pop("size")
    plan.pop("d_key", None)  # it is among the layer's columns
    hashed = hashed_of_schema_1(science, lr, table_lr)
    new = {
        "schema_version": 2,
        **{key: old[key] for key in ("sweep", "cell", "status", "reason", "method", "variant")},
        "size": size,
        "budget": science["budget"],
        "seed": science["seed"],
        "axes": axes,
        "batch_sequences": science["batch_sequences"],
        "lr": lr,
        "table_lr": table_lr,
        "fingerprint": fingerprint(hashed) if old["fingerprint"] else "",
        "hashed_config": hashed,
        "plan": {"data": science["data"]["source"], **plan},
        "layer": parse_layer(science["ffn"]).columns(science["size"]["d_model"]),
    }
    return {**new, **{key: value for key, value in old.items() if key not in (*new, "science")}}


def hashed_of_schema_1(science: Mapping[str, Any], lr: float, table_lr: float | None) -> dict[str, Any]:
    """The values that schema 2 hashes for a cell, given those that schema 1 hashed (`science`)."""
    config = _config(science)
    tree = json.loads(json.dumps(science))
    for key in NAMES:
        remove_key(tree, key)
    tree["optim"] |= {"lr": lr, "table_lr": table_lr}
    tree["data"]["evaluation"] = {name: tokens for name, tokens in tree["data"]["evaluation"].items() if tokens}
    tree["replaced"] = list(config.replaced_blocks)
    return tree


def _config(science: Mapping[str, Any]) -> Config:
    tree = {key: value for key, value in science.items() if key not in ("data_fingerprint", "recipe_version")}
    data = {**tree["data"], "path": "-"}  # source `text` requires a path
    return parse_config({**tree, "data": data, "trainer": {}, "tracking": {}})


def axes_of_name(cell: str, science: Mapping[str, Any]) -> dict[str, Any]:
    """The axes in the name of a cell of schema 1: dotted keys, with the values of its configuration."""
    keys = {"data": "data", "optim": "optim", **{key.rpartition(".")[2]: key for key, _ in _leaves(science)}}
    leaves, axes = dict(_leaves(science)), {}
    for name, text in _parts_of_name(cell):
        key = keys.get(name, name)
        axes[key] = leaves.get(key, text)
    label = "-".join(f"{name}={text}" for name, text in _parts_of_name(cell))
    if axes_label(axes) != label:
        raise UserError(f"{cell}: its name has {label}, but its configuration {axes_label(axes)}")
    return axes


def _parts_of_name(cell: str) -> list[tuple[str, str]]:
    """The axes in the name of a cell of schema 1, as written there."""
    return re.findall(r"-([a-z_0-9]+)=(.*?)(?=-[a-z_0-9]+=|-s\d+$)", cell)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


if __name__ == "__main__":
    sys.exit(exit_code(main))
