"""A study of a few tiny cells, kept wholly in a test's own folder, and the records that its cells would leave."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from peerscale.plan.cell import Cell
from peerscale.records.machine import cpu_name
from peerscale.records.record import Record, Status, new_record
from peerscale.stats.curve import NAMING, Curve, described_curves, from_names

CORPUS = "0123456789abcdef"
"""Stands for the fingerprint of a prepared corpus."""

TOY = "{methods: [dense, peer], grid: [{budget: 1e10, d_model: [8, 12]}, {budget: 3e10, d_model: [12, 16]}]}"
"""At `min_steps=65` three of its eight cells are dropped: d12 of dense and both sizes of peer at 1e10."""


def write_study(folder: Path, sweep: str = TOY, settings: str = "") -> Path:
    """A study's file, from its `sweep` section and other settings; cells and data belong in the same folder."""
    file = folder / "toy.yaml"
    file.write_text(
        f"sweep: {sweep}\n"
        f"trainer: {{runs_directory: {folder / 'runs'}}}\ndata: {{directory: {folder / 'data'}}}\n{settings}\n"
    )
    return file


def kept_in(folder: Path, cell: Cell) -> Cell:
    """The cell as it is in a study of the same text in `folder`."""
    config = cell.config
    trainer = replace(config.trainer, runs_directory=str(folder / "runs"))
    return replace(
        cell, config=replace(config, trainer=trainer, data=replace(config.data, directory=str(folder / "data")))
    )


def record_of(
    cell: Cell, status: Status, *, corpus: str = CORPUS, config: dict[str, Any] | None = None, **fields
) -> Record:
    """The record of a cell, `config` changed in its configuration and `fields` in the record."""
    changed = replace(cell.config, **(config or {}))
    common: dict[str, Any] = {"environment": {"hardware": cpu_name(), "n_threads": changed.trainer.threads}}
    if status is Status.DONE:
        loss = {"loss": 5.25, "se": 0.125, "tokens": 131072.0, "bits_per_byte": 2.5, "ppl": 190.5}
        common |= {"evaluation": {"validation": loss}, "timing": {"wall_s": 2.0, "flops_per_s": 1e9}}
    return replace(new_record(replace(cell, config=changed), status, corpus), **{**common, **fields})


def settings_text(arm: str) -> str:
    """The column `settings` of a cell with settings such as `batch_sequences=8-lr=0.1`."""
    pairs = dict(pair.split("=") for pair in re.split(r"-(?=[a-z])", arm)) if arm else {}
    keys = {"lr": "optim.lr", "table_lr": "optim.table_lr"}
    return (
        json.dumps(
            {
                keys.get(key, key): value if value.isalpha() and value not in ("true", "false") else json.loads(value)
                for key, value in pairs.items()
            }
        )
        if pairs
        else ""
    )


def curve_of(name: str) -> Curve:
    """The curve of a name such as `peer batch_sequences=8`."""
    method, _, settings = name.partition(" ")
    return Curve.of(method, json.loads(settings_text(settings) or "{}"))


def fits_with_curves(fits: Mapping[str, Any], baseline: str = "dense") -> dict[str, Any]:
    """Fits that a test writes with names of curves, as `read_fits` reads them."""
    names: set[str] = set()

    def collect(value: Any, key: str = "") -> None:
        if isinstance(value, dict | list):
            for k, item in value.items() if isinstance(value, dict) else enumerate(value):
                collect(item, str(k))
        elif key in NAMING and isinstance(value, str):
            names.add(value)

    collect(fits)
    return from_names({"baseline": baseline, "curves": described_curves(map(curve_of, names)), **fits})
