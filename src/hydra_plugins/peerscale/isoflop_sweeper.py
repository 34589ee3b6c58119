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
        from peerscale.data.store import read_manifest
        from peerscale.errors import FailedCells
        from peerscale.outcomes import published_as_done, published_study, some
        from peerscale.runs.record import Status
        from peerscale.sweeper import (
            STUDY_OVERRIDES,
            diverged_lines,
            evaluation_lines,
            pending_cells,
            planned_cells,
            split_published,
        )

        assert self.config is not None and self.launcher is not None
        if (file := registered_file(str(self.config.hydra.job.config_name))) is None:
            raise ConfigError("only a study runs several cells: make sweep SWEEP=NAME")
        chosen, results = split_published([*STUDY_OVERRIDES, *arguments])
        cells = planned_cells(file, chosen)
        study = published_study(cells[0].sweep, results) if results else None
        was_there = read_manifest(cells[0].config.data)
        manifest = prepare(cells[0].config.data).manifest
        if manifest != was_there:  # how large its sets are decides which cells are dropped
            cells = planned_cells(file, chosen)
        corpus = manifest.fingerprint
        elsewhere = published_as_done(cells, study, corpus) if study else set()
        left = [cell for cell in cells if cell.name not in elsewhere]
        pending, diverged = pending_cells(left, corpus), diverged_lines(left, corpus)
        dropped = sum(cell.plan.verdict == "DROP" for cell in left)
        name, done = cells[0].sweep, len(cells) - len(pending) - dropped - len(diverged)
        published = f" ({len(elsewhere)} of them published)" if elsewhere else ""
        counts = f"{done} done{published}, {dropped} dropped, {len(pending)} to run"
        print(f"{name}: {len(cells)} cells, {counts}", file=sys.stderr)
        notices = [f"notice: {line}" for line in evaluation_lines(cells, short_only=True)]
        print(*(f"{line}\n" for line in notices + diverged), sep="", end="", file=sys.stderr)
        if pending and isinstance(self.launcher, SlurmLauncher):
            return self.launcher.submit(pending)
        outcomes = self._run(name, pending, done) if pending else {}
        failed = [cell for cell, status in outcomes.items() if status in (Status.FAILED, Status.DIVERGED)]
        failed += [line.partition(" ")[0] for line in diverged]
        if failed:
            raise FailedCells(
                f"{len(failed)} of {len(cells)} cells failed: {some(failed)}; reasons: make status SWEEP={name}"
            )
        draw = f"make figures SWEEP={name}{' PUBLISHED=1' if elsewhere else ''}"
        if Status.RUNNING in outcomes.values():
            print(f"some cells are being run by another process: make status SWEEP={name}", file=sys.stderr)
        else:
            print(f"{'all cells are done' if pending else 'nothing to run'}; next: {draw}", file=sys.stderr)
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
