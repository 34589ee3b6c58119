"""The committed copy of a study in results/: publishing it, and restoring its cells to runs/."""

import shutil
from pathlib import Path

from peerscale.errors import UserError
from peerscale.files import finish_replacing, from_checkout, replacing, write_text
from peerscale.records.curves import CURVES, METRIC, METRICS, row_line
from peerscale.records.matching import some
from peerscale.records.record import ENDED, RECORD, Record, Status, write_record
from peerscale.records.study import StudyFolder, read_json
from peerscale.records.table import read_records, read_table


def publish(source: StudyFolder, target: StudyFolder, *, replace_cells: bool = False) -> str:
    """Copy a collected study to the published ones; other files in its folder there are kept.

    Args:
        source, target: the collected study, and the published one.
        replace_cells: whether published finished cells may be removed, or replaced by cells of another configuration.

    Returns:
        A message on how many finished cells there are.

    Raises:
        UserError: the study is not complete, has guests, or published finished cells would be lost. Nothing is written
            then.
    """
    finish_replacing(target.folder)
    for path in (source.runs, source.fits, source.table):
        if not path.exists():
            raise UserError(f"{path} is not there; first: make figures SWEEP={source.sweep}")
    shown = (source.records, source.sequence_losses, source.curves, source.runs, source.fits)
    for path in shown:
        if path.is_file() and source.table.stat().st_mtime_ns < path.stat().st_mtime_ns:
            raise UserError(f"{source.table} is older than {path.name}; first: make figures SWEEP={source.sweep}")
    if guests := read_json(source.fits).get("guests"):
        raise UserError(
            f"{guests[0]} is no method of {source.sweep}, whose file names those to publish: keep its runs by a sweep "
            f"file of your own that names it, or move {from_checkout(source.folder.parent)}/{guests[0]}-* away; then: "
            f"make figures SWEEP={source.sweep}"
        )
    old, new = (_finished(study) for study in (target, source))
    lost = [cell for cell in old if cell not in new or new[cell].fingerprint != old[cell].fingerprint]
    if lost and not replace_cells:
        raise UserError(
            f"this would remove finished cells of {target.folder}, or put others in their place: {some(lost)}; "
            f"make restore SWEEP={source.sweep} brings back those that are not in runs/; to do it anyway: "
            f"make publish SWEEP={source.sweep} REPLACE=1"
        )
    with replacing(target.folder) as folder:
        if target.folder.is_dir():
            shutil.copytree(target.folder, folder, ignore=shutil.ignore_patterns(target.figures.name))
        folder.mkdir(exist_ok=True)
        for path in (*shown, source.table, source.csv):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
        if source.figures.is_dir():
            shutil.copytree(source.figures, folder / source.figures.name, copy_function=shutil.copyfile)
    return f"{len(new)} finished cells, {len(new.keys() - old.keys())} of them new -> {target.folder}"


def _finished(study: StudyFolder) -> dict[str, Record]:
    """The finished cells of a study by name."""
    return {record.cell: record for record in read_records(study.folder) if record.status is Status.DONE}


def restore(source: StudyFolder, runs: Path) -> tuple[int, int]:
    """Put the records and training curves of a published study's ended cells into their folders in `runs`.

    From then on they are cells like any other. A cell that has a record in `runs` is left as it is.

    Returns:
        How many cells were restored, and how many were left.

    Raises:
        UserError: the study is not published.
    """
    if not source.records.is_file():
        raise UserError(f"{source.records} is not there: no records of {source.sweep!r} to restore")
    ended = [record for record in read_records(source.folder) if record.status in ENDED]
    curves = read_table(source.curves, CURVES)
    logged = {str(cell): rows[list(METRIC)].to_dict("records") for cell, rows in curves.groupby("cell")}
    missing = [record for record in ended if not (runs / source.sweep / record.cell / RECORD).exists()]
    for record in missing:
        folder = runs / source.sweep / record.cell
        write_text(folder / METRICS, "".join(map(row_line, logged.get(record.cell, []))))
        write_record(folder, record)  # last, so that a cell is restored wholly or again
    return len(missing), len(ended) - len(missing)
