"""Upload the cells of a study, and its tables, fits and figures, to Weights & Biases: what is not there yet.

    .venv/bin/python analysis/sync.py SWEEP [--jobs N] [--timeout SECONDS]

It reads the cells' files, so it does not matter whether they were tracked online, offline or not at all. It can be
stopped and repeated at any time, also while the study runs: rows that the server has are not sent again, and cells
still logging online are skipped. Each finished cell becomes an artifact. The run `<sweep>-study` uses these artifacts
and logs table, fits and figures, so that W&B shows which runs a figure was made from. Exit code 3 if something could
not be uploaded.
"""

import hashlib
import json
import re
import sys
import tempfile
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from peerscale.errors import FailedCells, UserError, exit_code
from peerscale.files import write_text
from peerscale.layers.registry import parse_layer
from peerscale.runs.record import RECORD, Record, Status, read_record
from peerscale.runs.study import Study, collected, study_parser
from peerscale.runs.table import METRICS, read_metrics
from peerscale.training.signals import Watch
from peerscale.training.tracking import WandbError, WandbRun, client_errors, client_settings

MARKER = "wandb-upload.json"
"""File beside what was uploaded: the server's address and a digest of each file."""

CONFIG = "config.yaml"


@dataclass(frozen=True, kw_only=True, slots=True)
class CellFiles:
    """What a cell's folder has for W&B."""

    folder: Path
    record: Record
    settings: dict[str, Any] = field(repr=False)

    @property
    def files(self) -> list[Path]:
        return [path for name in (RECORD, CONFIG, METRICS) if (path := self.folder / name).is_file()]

    @property
    def artifact(self) -> str:
        """Its name at W&B, which allows few characters."""
        return re.sub(r"[^\w.-]", "-", f"{self.record.sweep}-{self.record.cell}")

    @property
    def logs_online(self) -> bool:
        """Whether it may still be training and writing to its W&B run."""
        return self.record.status is Status.RUNNING and self.settings["tracking"]["mode"] == "online"


def main(argv: Sequence[str] | None = None) -> int:
    parser = study_parser(__doc__)
    parser.prog = ".venv/bin/python analysis/sync.py"
    parser.formatter_class = RawDescriptionHelpFormatter
    parser.add_argument("--jobs", type=int, default=4, metavar="N", help="cells uploaded at a time (default: 4)")
    parser.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="the longest wait for the server (default: 60)",
    )
    arguments = parser.parse_args(argv)
    if arguments.jobs < 1 or arguments.timeout <= 0:
        raise UserError("--jobs must be at least 1 and --timeout above 0")
    cells = list(study_cells(arguments.runs / arguments.sweep))
    if not cells:
        raise UserError(f"no cells in {arguments.runs / arguments.sweep}: make sweep SWEEP={arguments.sweep}")
    import wandb

    server = wandb.setup(wandb.Settings(silent=True)).settings.base_url
    waiting = [cell for cell in cells if not cell.logs_online and is_new(cell.folder, cell.files, server)]
    failed = upload_cells(waiting, server, arguments.jobs, arguments.timeout)
    live = sum(cell.logs_online for cell in cells)
    before, now = len(cells) - len(waiting) - live, len(waiting) - len(failed)
    skipped = f", {live} still logging online, skipped" if live else ""
    print(f"{arguments.sweep}: {now} cells uploaded to {server}, {before} were there already{skipped}")
    if not failed:
        study = collected(arguments.sweep, arguments.runs)
        print(f"{arguments.sweep}: {upload_study(study, cells, server, arguments.timeout)}")
        return 0
    name, reason = next(iter(failed.items()))
    raise FailedCells(f"{len(failed)} cells are not uploaded, {name}: {reason}; the same command goes on from here")


def study_cells(folder: Path) -> Iterator[CellFiles]:
    """The cells of a study that have started."""
    for cell in sorted(folder.iterdir()) if folder.is_dir() else ():
        record = read_record(cell) if cell.is_dir() else None
        if record is not None and record.cell == cell.name and (cell / CONFIG).is_file():
            settings = yaml.safe_load((cell / CONFIG).read_text(encoding="utf-8"))
            yield CellFiles(folder=cell, record=record, settings=settings)


def is_new(folder: Path, files: Iterable[Path], server: str) -> bool:
    """Whether `files` differ from what was uploaded from `folder` to this server."""
    marker = folder / MARKER
    return not marker.is_file() or json.loads(marker.read_text(encoding="utf-8")) != contents(files, server)


def contents(files: Iterable[Path], server: str) -> dict[str, str]:
    """What a marker says: the server, and a digest of each file."""
    return {"server": server} | {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def upload_cells(cells: Sequence[CellFiles], server: str, jobs: int, timeout_s: float) -> dict[str, str]:
    """Upload `jobs` cells at a time; those that failed, by name, with the reason.

    A server that does not answer once is not asked for the rest.
    """
    failed: dict[str, str] = {}
    without_artifact: list[str] = []
    with ThreadPoolExecutor(jobs) as pool:
        pending: dict[Future[str], CellFiles] = {
            pool.submit(upload_cell, cell, server, timeout_s): cell for cell in cells
        }
        for future in tqdm(as_completed(pending), total=len(pending), unit="cell", disable=not sys.stderr.isatty()):
            name = pending[future].record.cell
            try:
                without_artifact += [problem] if (problem := future.result()) else []
            except CancelledError:
                failed[name] = "the server did not answer"
            except WandbError as error:
                failed = {name: str(error), **failed}
                for other in pending:
                    other.cancel()
    if without_artifact:
        print(f"notice: {len(without_artifact)} cells have no artifact yet: {without_artifact[0]}", file=sys.stderr)
    return failed


def upload_cell(cell: CellFiles, server: str, timeout_s: float) -> str:
    """Send what the server lacks of one cell.

    Returns:
        Why its artifact could not be made, or nothing.

    Raises:
        WandbError: the server did not take the run.
    """
    state = contents(cell.files, server)  # before it is read: rows written meanwhile are sent the next time
    problem = ""
    with tempfile.TemporaryDirectory() as scratch:
        run = WandbRun(Path(scratch), cell.settings, cell.record, online=True, timeout_s=timeout_s)
        watch = Watch(*parse_layer(cell.settings["ffn"]).routed())
        for row in read_metrics(cell.folder):
            run.log(row, watch.see(row))
        if cell.record.status is not Status.RUNNING:
            try:
                with client_errors():
                    log_artifact(run.run, cell.artifact, "cell", cell.files)
            except WandbError as error:
                problem = str(error)
        run.finish(cell.record)
    if not problem:
        write_text(cell.folder / MARKER, json.dumps(state) + "\n")
    return problem


def log_artifact(run: Any, name: str, kind: str, files: Iterable[Path]) -> None:
    """Log files as an artifact, without copying them to a cache."""
    import wandb

    artifact = wandb.Artifact(name, type=kind)
    for path in files:
        artifact.add_file(str(path), name=path.name, policy="immutable", skip_cache=True)
    run.log_artifact(artifact)


def upload_study(study: Study, cells: Sequence[CellFiles], server: str, timeout_s: float) -> str:
    """Log a study's table, fits and figures as artifacts of a run that used the cells'; says what it did.

    Raises:
        FailedCells: the server did not take them.
    """
    figures = sorted(study.figures.glob("*.p*"))
    tables = [study.runs, study.records, study.curves, study.table]
    artifacts = {"table": [path for path in tables if path.is_file()], "fits": [study.fits], "figures": figures}
    files = [path for paths in artifacts.values() for path in paths if path.is_file()]
    if not study.runs.is_file():
        return f"no table, fits and figures yet: make figures SWEEP={study.sweep}"
    if not is_new(study.folder, files, server):
        return "table, fits and figures are there already"
    import wandb

    tracking = cells[0].settings["tracking"]
    used = [cell.artifact for cell in cells if cell.record.status is not Status.RUNNING]
    try:
        with tempfile.TemporaryDirectory() as scratch, client_errors():
            run = wandb.init(
                mode="online",
                project=tracking["project"],
                entity=tracking["entity"],
                dir=scratch,
                id=re.sub(r"[^\w-]", "-", f"{study.sweep}-study{tracking['id_salt']}"),
                resume="allow",
                reinit="create_new",
                name=f"{study.sweep}-study",
                group=study.sweep,
                job_type="study",
                settings=client_settings(timeout_s),
            )
            for name in used:
                run.use_artifact(f"{name}:latest")
            for kind, paths in artifacts.items():
                log_artifact(run, f"{study.sweep}-{kind}", kind, [path for path in paths if path.is_file()])
            run.log({f"figures/{path.stem}": wandb.Image(str(path)) for path in figures if path.suffix == ".png"})
            run.finish()
    except WandbError as error:
        raise FailedCells(f"the cells are uploaded, but not the study's table, fits and figures: {error}") from None
    write_text(study.folder / MARKER, json.dumps(contents(files, server)) + "\n")
    return f"table, fits and {len(figures)} figure files uploaded, made from {len(used)} cells"


if __name__ == "__main__":
    sys.exit(exit_code(main))
