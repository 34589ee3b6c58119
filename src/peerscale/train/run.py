"""Run one cell: compose, plan, skip or resume, train, record. Several: Hydra's `-m`, or a study (`peerscale.launch`).

    python -m peerscale.train ffn=peer d_model=32 budget=2e11
    python -m peerscale.train -m ffn=peer,dense d_model=32,48
    python -m peerscale.train ffn=peer d_model=32 budget=2e11 trainer.devices=2

torch and lightning are imported inside the cell, so that planning and skipping take no time. Exit codes:
`peerscale.errors`.
"""

import os
import shutil
import sys

import hydra
from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from peerscale.config.compose import Composition
from peerscale.config.errors import hydra_errors
from peerscale.data.prepare import prepare
from peerscale.data.store import read_manifest
from peerscale.errors import FailedCells, UserError, exit_code
from peerscale.files import OURS
from peerscale.plan.cell import Cell
from peerscale.plan.cells import single_cell
from peerscale.plan.notices import evaluation_lines
from peerscale.plan.plan import Verdict
from peerscale.records.outcome import FINISHED, how_to_rerun, outcome
from peerscale.records.record import LOCK, Status, read_record
from peerscale.train.progress import Progress


@hydra.main(config_path=str(OURS / "conf"), config_name="config", version_base="1.3")
def hydra_job(tree: DictConfig) -> None:
    """One Hydra job: a single cell."""

    def run() -> None:
        with hydra_errors():
            plain = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
        run_single(Composition.of(plain, HydraConfig.get().runtime.choices))

    if HydraConfig.get().mode is RunMode.MULTIRUN:
        return run()  # Hydra runs the other jobs as well, and then raises the first error
    # Exit here, since Hydra would print its own line above an error.
    sys.exit(exit_code(run))


def refuse_dropped(cell: Cell) -> None:
    """Raise `UserError` with the reason if the plan drops the cell."""
    if cell.plan.verdict is Verdict.DROP:
        raise UserError(f"{cell.name} cannot be run: {cell.plan.reason}")


def run_single(composition: Composition) -> None:
    """Run one cell and print its result."""
    cell = single_cell(composition)
    refuse_dropped(cell)
    was_there = read_manifest(cell.config.data)
    corpus = prepare(cell.config.data)
    if corpus.manifest != was_there:  # the sizes of its sets decide whether the cell is dropped
        cell = single_cell(composition)
        refuse_dropped(cell)
    for line in evaluation_lines([cell], short_only=True):
        print(f"notice: {line}", file=sys.stderr)
    if (status := outcome(cell, corpus.manifest.fingerprint).status) not in FINISHED:
        with Progress(cell.sweep, [cell]):
            status = run_cell(cell)
    if status is Status.RUNNING:  # by another process, as `run_cell` has said
        return
    record = read_record(cell.folder)
    if record is None or status is not Status.DONE:
        why = f": {record.reason}" if record and record.status is status else ""
        raise FailedCells(f"{cell.name} {status}{why}; {how_to_rerun(cell, status)}")
    losses = ", ".join(f"{name} {values['loss']:.4f}" for name, values in record.evaluation.items())
    kept = [f"; trained model: {path}" for path in (cell.folder / "checkpoints").glob("step-*.ckpt")]
    print(f"{cell.name} is done: {losses} nats per token; {cell.folder}{''.join(kept)}")


def run_cell(cell: Cell) -> Status:
    """Run or resume a cell, unless it is done or another worker is running it; its record has the outcome.

    An error of the disk costs this cell alone: it has failed, even if its record cannot say so.

    Raises:
        UserError: the cell cannot be run as it is; if it was never run before, its folder is removed.
    """
    from peerscale.train.cell import train_cell

    try:
        cell.folder.mkdir(parents=True, exist_ok=True)
        # Wait a second, since `status` holds the lock briefly when it checks whether a cell is running.
        with FileLock(cell.folder / LOCK, timeout=1):
            return train_cell(cell)
    except UserError:
        if not any(path.name != LOCK for path in cell.folder.iterdir()):
            shutil.rmtree(cell.folder)
        raise
    except Timeout:
        print(f"{cell.name} is being run by another process and is skipped here", file=sys.stderr)
        return Status.RUNNING
    except OSError as error:
        print(f"\n{cell.name} failed: {error}", file=sys.stderr)
        return Status.FAILED


def main() -> int:
    """Let Hydra compose and run the job; its errors become `ConfigError`."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises errors instead of printing them
    with hydra_errors():
        hydra_job()
    return 0
