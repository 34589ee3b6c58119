"""Convert records and tables that an earlier peerscale wrote to the present schema; no number changes.

python -m peerscale.runs.convert [FOLDER ...]

Schema 1 had a cell's axes in its name alone, and hashed the names of rules where schema 2 hashes their results.
"""

import csv
import io
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
from peerscale.runs.record import NAMES, RECORD, SCHEMA_VERSION, SET_ASIDE, fingerprint, parse_record, remove_key
from peerscale.runs.study import RESULTS, RUNS

NO_LONGER = ("energy_j", "bytes_moved")
"""Columns that tables no longer have."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m peerscale.runs.convert", description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, default=[RUNS, RESULTS], help="default: runs and results")
    folders = parser.parse_args(arguments).folders
    if missing := [folder for folder in folders if folder not in (RUNS, RESULTS) and not folder.is_dir()]:
        raise UserError(f"{missing[0]} is not a folder")
    converted = {path: text for path, text in _converted(folders) if text is not None}
    for path, text in converted.items():
        write_text(path, text)
    print(f"{len(converted)} files converted to schema version {SCHEMA_VERSION}")
    return 0


def _converted(folders: Sequence[Path]) -> Iterator[tuple[Path, str | None]]:
    """Every file of records or runs, and its new content; None where it is of the present schema."""
    for folder in folders:
        for path in sorted(folder.rglob(RECORD)):
            if not path.parent.name.endswith(SET_ASIDE):
                yield path, _records(path, [path.read_text(encoding="utf-8")], indent=1)
        for path in sorted(folder.rglob("records.jsonl")):
            yield path, _records(path, path.read_text(encoding="utf-8").splitlines())
        for path in sorted(folder.rglob("runs.csv")):
            yield path, _table(path)


def _records(path: Path, texts: Sequence[str], indent: int | None = None) -> str | None:
    trees = []
    for number, text in enumerate(texts, 1):
        try:
            trees.append(json.loads(text))
        except ValueError:
            print(f"notice: {path}:{number} is no JSON: the file is left as it is", file=sys.stderr)
            return None
    if not any(isinstance(tree, dict) and tree.get("schema_version") == 1 for tree in trees):
        return None
    new = [record_of_schema_1(tree) if tree["schema_version"] == 1 else tree for tree in trees]
    for number, tree in enumerate(new, 1):
        parse_record(tree, f"{path}:{number}")
    return "".join(json.dumps(tree, indent=indent) + "\n" for tree in new)


def record_of_schema_1(old: Mapping[str, Any]) -> dict[str, Any]:
    """A record of schema 2 with the numbers of one of schema 1."""
    science, plan = old["science"], dict(old["plan"])
    axes = axes_of_name(old["cell"], science)
    table_lr, lr, size = plan.pop("table_lr"), plan.pop("lr"), plan.pop("size")
    plan.pop("d_key", None)  # the layer's own
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
    """What schema 2 hashes of the cell of which schema 1 hashed `science`."""
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
    data = {**tree["data"], "path": "-"}  # which a text must have
    return parse_config({**tree, "data": data, "trainer": {}, "tracking": {}})


def axes_of_name(cell: str, science: Mapping[str, Any]) -> dict[str, Any]:
    """The axes that the name of a cell of schema 1 holds: dotted keys, and the values that its configuration has."""
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
    """The axes in the name of a cell of schema 1, as they stand there."""
    return re.findall(r"-([a-z_0-9]+)=(.*?)(?=-[a-z_0-9]+=|-s\d+$)", cell)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


OF_TABLES = {"lr": "optim.lr", "table_lr": "optim.table_lr"}
"""Axes of the one study that was published without its records."""


def _table(path: Path) -> str | None:
    """A table of runs with the column `axes`; every other value is copied as it stands."""
    rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"), newline="")))
    if not rows or "axes" in rows[0] or not {"cell", "budget"} <= {*rows[0]}:
        return None
    records = path.with_name("records.jsonl")
    lines = records.read_text(encoding="utf-8").splitlines() if records.is_file() else []
    known = {tree["cell"]: axes_of_record(tree) for tree in map(json.loads, lines)}
    cell, after = rows[0].index("cell"), rows[0].index("budget") + 1
    kept = [i for i, column in enumerate(rows[0]) if column not in NO_LONGER]
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    for number, row in enumerate(rows):
        axes = known.get(row[cell]) or {
            OF_TABLES.get(name, name): float(text) if OF_TABLES.get(name) else text
            for name, text in _parts_of_name(row[cell])
        }
        written = (json.dumps(axes) if axes else "") if number else "axes"
        writer.writerow([*(row[i] for i in kept if i < after), written, *(row[i] for i in kept if i >= after)])
    return out.getvalue()


def axes_of_record(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The axes of a record of either schema."""
    return tree["axes"] if tree["schema_version"] > 1 else axes_of_name(tree["cell"], tree["science"])


if __name__ == "__main__":
    sys.exit(exit_code(main))
