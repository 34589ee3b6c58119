"""Which records of a study are of its plan, and which are of another configuration or of other cells."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peerscale.plan.cell import Cell
from peerscale.records.record import Record, Status, differences


def of_the_plan(
    cells: Iterable[Cell], records: Mapping[str, Record], where: Path, data_fingerprint: str | None
) -> tuple[dict[str, Record], list[str]]:
    """The records that match the plan's configuration or are of no cell of the plan; and a notice about the others."""
    differ = {
        cell.name: found
        for cell in cells
        if cell.name in records and (found := differences(cell, records[cell.name], data_fingerprint))
    }
    kept = {name: record for name, record in records.items() if name not in differ}
    if not differ:
        return kept, []
    name, found = next(iter(differ.items()))
    count = f"{len(differ)} cells, {name} among them, have" if len(differ) > 1 else f"{name} has"
    return kept, [f"notice: {where}: {count} another configuration than the plan: {'; '.join(found)}"]


def on_one_corpus(
    records: Mapping[str, Record], planned: Collection[str]
) -> tuple[dict[str, Record], list[str], str | None]:
    """The records that have the corpus, tokenizer and evaluation set of most finished ones, those of the plan first.

    Returns:
        These records, with all of the plan, of which `of_the_plan` says more; the names of the others; and the
        fingerprint of the corpus, None if nothing is finished.
    """
    done = [record for record in records.values() if record.status is Status.DONE]
    used = Counter(_measured_on(record) for record in [r for r in done if r.cell in planned] or done)
    if not used:
        return {**records}, [], None
    usual, _ = used.most_common(1)[0]
    elsewhere = [r.cell for r in records.values() if r.hashed_config and _measured_on(r) != usual]
    others = [cell for cell in elsewhere if cell not in planned]
    return {name: record for name, record in records.items() if name not in others}, others, usual[0]


def _measured_on(record: Record) -> tuple[Any, ...]:
    config = record.hashed_config
    data = config.get("data", {})
    return config.get("data_fingerprint"), data.get("val_set"), data.get("evaluation", {}).get(data.get("val_set"))


def some(names: Sequence[str]) -> str:
    """The first three names of a list, and `...` if there are more."""
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def further_line(names: Sequence[str]) -> str:
    """One line about cells that have a record but are not in the plan."""
    return f"{len(names)} further cell{'s' * (len(names) > 1)} not in the plan: {some(names)}"
