"""The isoFLOP sweeper: `hydra/sweeper=isoflop`, with the cells of the sweep file that are still to be run."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class IsoflopSweeper(Sweeper):
    """Hands the pending cells of a study to the launcher, longest first."""

    def __init__(self) -> None:
        self.config: DictConfig | None = None
        self.launcher: Launcher | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        # Hydra imports every plugin at every start; what the sweep needs is imported when there is one.
        from hydra_plugins.peerscale.slurm_launcher import SlurmLauncher
        from peerscale.composition import registered_file
        from peerscale.config import ConfigError
        from peerscale.data.prepare import prepare
        from peerscale.errors import FailedCells
        from peerscale.runs.record import Status
        from peerscale.sweeper import STUDY_OVERRIDES, diverged_lines, pending_cells, planned_cells

        assert self.config is not None and self.launcher is not None
        if (study := registered_file(str(self.config.hydra.job.config_name))) is None:
            raise ConfigError("only a study runs several cells: make sweep SWEEP=NAME")
        cells = planned_cells(study, [*STUDY_OVERRIDES, *arguments])
        corpus = prepare(cells[0].config.data)
        pending = pending_cells(cells, corpus.manifest.fingerprint)
        dropped = sum(cell.plan.verdict == "DROP" for cell in cells)
        diverged = diverged_lines(cells, corpus.manifest.fingerprint)
        name, done = cells[0].sweep, len(cells) - len(pending) - dropped - len(diverged)
        print(f"{name}: {len(cells)} cells, {done} done, {dropped} dropped, {len(pending)} to run", file=sys.stderr)
        print(*(f"{line}\n" for line in diverged), sep="", end="", file=sys.stderr)
        if pending and isinstance(self.launcher, SlurmLauncher):
            return self.launcher.submit(pending)
        outcomes = self._run(name, pending, done) if pending else {}
        failed = [cell for cell, status in outcomes.items() if status in (Status.FAILED, Status.DIVERGED)]
        failed += [line.partition(" ")[0] for line in diverged]
        if failed:
            raise FailedCells(
                f"{len(failed)} of {len(cells)} cells failed: {', '.join(failed[:5])}{' ...' if failed[5:] else ''}; "
                f"reasons: make status SWEEP={name}"
            )
        return outcomes

    def _run(self, name: str, pending: list[Any], done: int) -> dict[str, Any]:
        """The status of each cell that was run."""
        from peerscale.progress import Progress

        assert self.launcher is not None
        with Progress(name, pending, already_done=done), _workers_end_with(self.launcher):
            returns = self.launcher.launch([list(cell.overrides) for cell in pending], initial_job_idx=0)
        return {cell.name: job.return_value for cell, job in zip(pending, returns, strict=True)}


@contextmanager
def _workers_end_with(launcher: Launcher) -> Iterator[None]:
    """A SIGTERM is taken as Ctrl-C is, or the launcher's worker processes would stay. One without any trains here."""
    if isinstance(launcher, BasicLauncher):
        yield  # Lightning saves on the signal
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


ConfigStore.instance().store(
    group="hydra/sweeper",
    name="isoflop",
    node=OmegaConf.create({"_target_": f"{__name__}.IsoflopSweeper"}),
    provider="peerscale",
)
