"""The published copy of a study in results/, to be committed: its tables, fits and figures."""

import json
import shutil
from dataclasses import asdict, replace

from peerscale.errors import UserError
from peerscale.files import replacing
from peerscale.launch.outcomes import some
from peerscale.records.fingerprint import differing_keys
from peerscale.records.record import Record, Status
from peerscale.records.study import Study
from peerscale.records.table import read_records


def publish(source: Study, target: Study, *, replace_cells: bool = False) -> str:
    """Copy a collected study to the published ones; other files in its folder there are kept.

    Sequence losses are rounded to four decimals and tracebacks are left out; everything else is copied unchanged.

    Args:
        source, target: the collected study, and the published one.
        replace_cells: whether published finished cells may be removed, or replaced by cells of another configuration.

    Returns:
        A message on how many finished cells were added, replaced, kept and removed.

    Raises:
        UserError: the study is not complete, or published finished cells would be lost. Nothing is written then.
    """
    for path in (source.runs, source.table):
        if not path.exists():
            raise UserError(f"{path} is not there; first: make figures SWEEP={source.sweep}")
    for path in (source.records, source.curves, source.runs, source.fits):
        if path.is_file() and source.table.stat().st_mtime_ns < path.stat().st_mtime_ns:
            raise UserError(f"{source.table} is older than {path.name}; first: make figures SWEEP={source.sweep}")
    records = [public(record) for record in read_records(source.folder)]
    old, new = finished(target), {record.cell: record for record in records if record.status is Status.DONE}
    removed = [cell for cell in old if cell not in new]
    replaced = {cell: _differences(old[cell], new[cell]) for cell in old if cell in new and old[cell] != new[cell]}
    others = [f"{cell}: {found}" for cell, found in replaced.items() if found]
    losses = [f"remove {len(removed)} finished cells ({some(removed)})"] * bool(removed)
    losses += [f"replace {len(others)} by cells of another configuration ({some(others)})"] * bool(others)
    if losses and not replace_cells:
        again = f"make figures SWEEP={source.sweep} PUBLISHED=1 keeps those that would be removed; " * bool(removed)
        anyway = f"to do it anyway: make publish SWEEP={source.sweep} REPLACE=1"
        raise UserError(f"this would {' and '.join(losses)} in {target.folder}; {again}{anyway}")
    with replacing(target.folder) as folder:
        if target.folder.is_dir():
            shutil.copytree(target.folder, folder, ignore=shutil.ignore_patterns(target.figures.name))
        folder.mkdir(exist_ok=True)
        for kept in (source.runs, source.curves, source.fits, source.table):
            if kept.is_file():
                shutil.copyfile(kept, folder / kept.name)
        if source.figures.is_dir():
            shutil.copytree(source.figures, folder / source.figures.name, copy_function=shutil.copyfile)
        lines = "".join(json.dumps(asdict(record)) + "\n" for record in records)
        (folder / target.records.name).write_text(lines, encoding="utf-8")
    kept = len(old) - len(removed) - len(replaced)
    counts = f"{len(new) - kept - len(replaced)} added, {len(replaced)} replaced, {kept} kept, {len(removed)} removed"
    return f"finished cells: {counts} -> {target.folder}"


def finished(study: Study) -> dict[str, Record]:
    """The finished cells of a published study by name."""
    return {record.cell: record for record in read_records(study.folder) if record.status is Status.DONE}


def _differences(old: Record, new: Record) -> str:
    """How the configuration of a cell differs from the published one; empty if it is the same cell trained again."""
    same = old.fingerprint == new.fingerprint
    return "" if same else ", ".join(differing_keys(old.hashed_config, new.hashed_config)) or "fingerprint only"


def public(record: Record) -> Record:
    """The record as published: without traceback, which names a machine's folders, and with losses to four decimals,
    since the fifth is noise."""
    return replace(record, sequence_losses=[round(loss, 4) for loss in record.sequence_losses], traceback="")
