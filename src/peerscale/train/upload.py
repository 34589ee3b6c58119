"""Upload a study to Weights & Biases: the cells, tables, fits and figures that are not there yet.

It reads the cells' files, so it does not matter whether they were tracked online, offline or not at all. The client's
`wandb sync` is not enough: it appends all rows of a run to those on the server, so that a partly uploaded cell would
have rows twice; it waits for a server without limit; and it ignores cells without a W&B run, and artifacts.
"""

import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from tqdm import tqdm

from peerscale.errors import FailedCells, UserError
from peerscale.files import write_text
from peerscale.layers.registry import parse_layer
from peerscale.records.curves import METRICS, read_metrics
from peerscale.records.record import ENDED, RECORD, Record, Status, cell_folders, read_cell
from peerscale.records.study import Study, collected
from peerscale.train.signals import Watch
from peerscale.train.tracking import WandbError, WandbRun, client_errors, start_run

MARKER = "wandb-upload.json"
"""A file in the uploaded folder, with the server's address and a digest of each uploaded file."""

CONFIG = "config.yaml"


class CellFiles(NamedTuple):
    """The files of a cell's folder that are uploaded to W&B."""

    folder: Path
    record: Record
    settings: Mapping[str, Any]

    @property
    def files(self) -> list[Path]:
        return _there(self.folder / name for name in (RECORD, CONFIG, METRICS))

    @property
    def artifact(self) -> str:
        """The name of the artifact in W&B, which allows few characters."""
        return re.sub(r"[^\w.-]", "-", f"{self.record.sweep}-{self.record.cell}")

    @property
    def logs_online(self) -> bool:
        """Whether the cell may still be training and logging to its W&B run."""
        return self.record.status is Status.RUNNING and self.settings["tracking"]["mode"] == "online"


def upload(sweep: str, runs: Path, *, jobs: int, timeout_s: float) -> Iterator[str]:
    """Upload what the server does not have of a study, `jobs` cells at a time; skip cells still logging online.

    Each ended cell becomes an artifact. The run `<sweep>-study` uses these artifacts and logs table, fits and figures,
    so that W&B shows the runs behind each figure.

    Yields:
        Messages on what was done.

    Raises:
        UserError: there are no cells.
        FailedCells: the server did not take everything in time, or the files of a cell cannot be read; calling again
            continues from there.
    """
    import wandb

    cells = [*study_cells(runs / sweep)]
    if not cells:
        raise UserError(f"no cells in {runs / sweep}: make sweep SWEEP={sweep}")
    server = wandb.setup(wandb.Settings(silent=True)).settings.base_url
    live = sum(cell.logs_online for cell in cells)
    waiting = [cell for cell in cells if not cell.logs_online and is_new(cell.folder, cell.files, server)]
    unreadable: list[str] = []
    with ThreadPoolExecutor(jobs) as pool:
        pending = [pool.submit(upload_cell, cell, server, timeout_s) for cell in waiting]
        try:
            sent = tqdm(pending, unit="cell", disable=not sys.stderr.isatty())
            for future, cell in zip(sent, waiting, strict=True):
                try:
                    future.result()
                except UserError as error:
                    unreadable.append(f"{cell.record.cell}: {error}")
        except WandbError as error:  # if a server does not answer, the remaining cells are not tried
            pool.shutdown(cancel_futures=True)
            left = sum(is_new(cell.folder, cell.files, server) for cell in waiting)
            raise FailedCells(f"{left} cells are not uploaded, {error}; the same command goes on from here") from None
    if unreadable:
        raise FailedCells(
            f"all others are uploaded, but the files of {len(unreadable)} cannot be read: {unreadable[0]}"
        )
    skipped = f", {live} still logging online, skipped" if live else ""
    before = len(cells) - len(waiting) - live
    yield f"{sweep}: {len(waiting)} cells uploaded to {server}, {before} were there already{skipped}"
    yield f"{sweep}: {upload_study(collected(sweep, runs), cells, server, timeout_s)}"


def study_cells(folder: Path) -> Iterator[CellFiles]:
    """The cells of a study that have started."""
    yield from filter(None, map(read_files, cell_folders(folder)))


def read_files(folder: Path) -> CellFiles | None:
    """What a folder holds of a cell that has started; None: nothing."""
    record = read_cell(folder)
    if record is None or record.cell != folder.name or not (folder / CONFIG).is_file():
        return None
    return CellFiles(folder, record, yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8")))


def is_new(folder: Path, files: Iterable[Path], server: str) -> bool:
    """Whether `files` differ from what was uploaded from `folder` to this server."""
    marker = folder / MARKER
    return not marker.is_file() or json.loads(marker.read_text(encoding="utf-8")) != contents(files, server)


def contents(files: Iterable[Path], server: str) -> dict[str, str]:
    """The contents of a marker: the server, and a digest of each file."""
    return {"server": server} | {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def upload_cell(cell: CellFiles, server: str, timeout_s: float) -> None:
    """Send what the server does not have of one cell.

    Raises:
        WandbError: the server did not take it; the message names the cell.
        UserError: the cell's files cannot be read.
    """
    state = contents(cell.files, server)  # computed before reading, so that what is written later is sent next time
    cell = read_files(cell.folder) or cell  # it may have ended since the cells were listed
    watch, rows = Watch(*parse_layer(cell.settings["ffn"]).routed()), [*read_metrics(cell.folder)]
    try:
        with tempfile.TemporaryDirectory() as scratch, client_errors():
            run = WandbRun(Path(scratch), cell.settings, cell.record, online=True, timeout_s=timeout_s)
            for row in rows:
                run.log(row, watch.see(row))
            if cell.record.status in ENDED:
                log_artifact(run.run, cell.artifact, "cell", cell.files)
            run.finish(cell.record)
    except WandbError as error:
        raise WandbError(f"{cell.record.cell}: {error}") from None
    write_text(cell.folder / MARKER, json.dumps(state) + "\n")


def log_artifact(run: Any, name: str, kind: str, files: Iterable[Path]) -> None:
    """Log files as an artifact without copying them to a cache."""
    import wandb

    artifact = wandb.Artifact(name, type=kind)
    for path in files:
        artifact.add_file(str(path), name=path.name, policy="immutable", skip_cache=True)
    run.log_artifact(artifact)


def upload_study(study: Study, cells: Sequence[CellFiles], server: str, timeout_s: float) -> str:
    """Log a study's table, fits and figures as artifacts of a run that uses the cells' artifacts; returns a message.

    Raises:
        FailedCells: the server did not accept them.
    """
    figures = sorted(study.figures.glob("*.p*"))
    tables = _there((study.runs, study.records, study.curves, study.table))
    artifacts = {"table": tables, "fits": _there([study.fits]), "figures": figures}
    files = [path for paths in artifacts.values() for path in paths]
    if not study.runs.is_file():
        return f"no table, fits and figures yet: make figures SWEEP={study.sweep}"
    if not is_new(study.folder, files, server):
        return "table, fits and figures are there already"
    import wandb

    tracking = cells[0].settings["tracking"]
    used = [cell.artifact for cell in cells if cell.record.status in ENDED]
    try:
        with tempfile.TemporaryDirectory() as scratch, client_errors():
            number = re.sub(r"[^\w-]", "-", f"{study.sweep}-study{tracking['id_salt']}")
            named = {"id": number, "name": f"{study.sweep}-study", "group": study.sweep, "job_type": "study"}
            run = start_run(Path(scratch), tracking, online=True, timeout_s=timeout_s, **named)
            for name in used:
                run.use_artifact(f"{name}:latest")
            for kind, paths in artifacts.items():
                log_artifact(run, f"{study.sweep}-{kind}", kind, paths)
            run.log({f"figures/{path.stem}": wandb.Image(str(path)) for path in figures if path.suffix == ".png"})
            run.finish()
    except WandbError as error:
        raise FailedCells(f"the cells are uploaded, but not the study's table, fits and figures: {error}") from None
    write_text(study.folder / MARKER, json.dumps(contents(files, server)) + "\n")
    return f"table, fits and {len(figures)} figure files uploaded, made from {len(used)} cells"


def _there(paths: Iterable[Path]) -> list[Path]:
    return [path for path in paths if path.is_file()]
