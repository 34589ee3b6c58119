"""One cell: compose, plan, skip or resume, fit, record. `python -m peerscale.train` is also every sweep.

    python -m peerscale.train ffn=peer size=d32 budget=2e11
    torchrun --nproc-per-node 2 -m peerscale.train ffn=peer size=d32 budget=2e11 trainer.devices=2
    python -m peerscale.train --config-dir sweeps --config-name reproduce
    python -m peerscale.train --config-dir sweeps --config-name reproduce hydra/launcher=joblib hydra.launcher.n_jobs=2

torch and lightning are imported inside the cell, so that planning and skipping take no time. Exit codes:
`peerscale.errors`.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import hydra
from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from peerscale.composition import STUDY, check_hydra, config_error, register_study, sweep_file
from peerscale.config import parse_config
from peerscale.config_errors import ConfigError
from peerscale.data.prepare import prepare
from peerscale.data.store import read_manifest
from peerscale.errors import FailedCells, UserError, exit_code
from peerscale.files import ROOT
from peerscale.plan import Verdict
from peerscale.progress import Progress
from peerscale.runs.record import LOCK, Status, read_record
from peerscale.sweep_config import load_sweep
from peerscale.sweeper import (
    FINISHED,
    SINGLE,
    STUDY_OVERRIDES,
    Cell,
    evaluation_lines,
    how_to_rerun,
    single_cell,
    split_published,
    state,
)
from peerscale.training.distributed import started_ranks


@hydra.main(config_path=str(ROOT / "conf"), config_name="config", version_base="1.3")
def hydra_job(tree: DictConfig) -> str:
    """One job of Hydra's: a single cell, or a cell of a sweep in whatever process the launcher made."""
    if HydraConfig.get().mode is RunMode.MULTIRUN:
        return run_cell(_cell(tree))
    # Leave Hydra at once: it would print a line of its own above an error's.
    sys.exit(exit_code(lambda: run_single(_single(tree))))


def _single(tree: DictConfig) -> Cell:
    if "sweep" in tree:
        raise ConfigError("a study is run as a whole: leave out hydra.mode, or train one cell without --config-name")
    return _cell(tree)


def _cell(tree: DictConfig) -> Cell:
    try:
        plain: dict[str, Any] = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise config_error(error) from None
    plain.pop("sweep", None)
    name = str(HydraConfig.get().job.config_name)
    study = name.removesuffix(STUDY) if name.endswith(STUDY) else SINGLE
    return single_cell(parse_config(plain), HydraConfig.get().overrides.task, sweep=study)


def refuse_dropped(cell: Cell) -> None:
    """Raise `UserError` with the reason if the plan drops the cell."""
    if cell.plan.verdict is Verdict.DROP:
        raise UserError(f"{cell.name} cannot be run: {cell.plan.reason}")


def run_single(cell: Cell) -> None:
    """Run one cell for a user who waits for it; if torchrun or srun started its ranks, the first one reports."""
    refuse_dropped(cell)
    if started_ranks()[0] > 0:
        prepare(cell.config.data, quiet=True)
        run_cell(cell)
        return
    was_there = read_manifest(cell.config.data)
    corpus = prepare(cell.config.data)
    if corpus.manifest != was_there:  # how large its sets are decides whether the cell is dropped
        cell = single_cell(cell.config, cell.overrides, cell.sweep)
        refuse_dropped(cell)
    for line in evaluation_lines([cell], short_only=True):
        print(f"notice: {line}", file=sys.stderr)
    if (status := state(cell, corpus.manifest.fingerprint)) not in FINISHED:
        with Progress(cell.sweep, [cell]):
            status = run_cell(cell)
    record = read_record(cell.folder)
    if record is None or status is not Status.DONE:
        raise FailedCells(f"{cell.name} {status}" + (f": {record.reason}; {how_to_rerun(cell)}" if record else ""))
    losses = ", ".join(f"{name} {values['loss']:.4f}" for name, values in record.evaluation.items())
    kept = [f"; trained model: {path}" for path in (cell.folder / "checkpoints").glob("step-*.ckpt")]
    print(f"{cell.name} is done: {losses} nats per token; {cell.folder}{''.join(kept)}")


def run_cell(cell: Cell) -> Status:
    """Run, or resume, a cell, unless another worker has it or it is done; every outcome is in its record.

    Raises:
        UserError: it cannot be run as it is; if it was never run before, nothing of it stays.
    """
    from peerscale.training.cell import train_cell

    if started_ranks()[0] > 0:  # the first rank has the lock
        return train_cell(cell)
    cell.folder.mkdir(parents=True, exist_ok=True)
    try:
        # A second, since `status` takes the lock for a moment to see whether it is held.
        with FileLock(cell.folder / LOCK, timeout=1):
            return train_cell(cell)
    except UserError:
        if not any(path.name != LOCK for path in cell.folder.iterdir()):
            shutil.rmtree(cell.folder)
        raise
    except Timeout:
        print(f"{cell.name} is being run by another process: left to it", file=sys.stderr)
        return Status.RUNNING


def main() -> int:
    """Hand over to Hydra, its errors in our form."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise, so that errors come out in our form
    words = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for short, long in (("-cd", "--config-dir"), ("-cp", "--config-path"), ("-cn", "--config-name")):
        words.add_argument(short, long)
    named, others = words.parse_known_args()
    if named.config_name is not None:
        if started_ranks()[1] > 1:
            raise UserError("torchrun and srun start the ranks of one cell; a study starts those of its cells itself")
        folder = Path(named.config_dir or named.config_path or ROOT / "sweeps")
        study = sweep_file(folder / f"{named.config_name.removesuffix('.yaml')}.yaml")
        STUDY_OVERRIDES[:] = [
            word for word in others if _is_override(word) and not word.lstrip("+~").startswith("hydra")
        ]
        load_sweep(study, split_published(STUDY_OVERRIDES)[0])
        check_hydra(study)
        kept = [word for word in others if word not in STUDY_OVERRIDES]
        sys.argv[1:] = ["--config-name", register_study(study), *kept]
    overrides = [word for word in sys.argv[1:] if _is_override(word)]
    try:
        hydra_job()
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise config_error(error, overrides) from None
    except ValueError as error:
        if not str(error).startswith("Config group override"):  # Hydra's, of size=null and such
            raise
        raise config_error(error) from None
    return 0


def _is_override(word: str) -> bool:
    """Whether a word of the command line is an override rather than an option of Hydra's or its value."""
    return not word.startswith("-") and ("=" in word or word.startswith("~"))


if __name__ == "__main__":
    sys.exit(exit_code(main))
