"""The Slurm launcher: `hydra/launcher=slurm` (conf/hydra/launcher/slurm.yaml) submits job arrays and returns."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from peerscale.sweeper import Cell


class SlurmLauncher(Launcher):
    """Submits the cells that Slurm doesn't have yet; nothing on this machine waits for them."""

    def __init__(self, **settings: Any) -> None:
        self.settings = OmegaConf.create(settings)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        # Hydra imports every plugin at every start; what submitting needs is imported when there is a need.
        from peerscale.submission import check

        # At once: before a corpus is prepared for what cannot be submitted.
        self.config = check(OmegaConf.to_object(self.settings))

    def submit(self, cells: "Sequence[Cell]") -> None:
        """Submit those of the cells that have no job waiting or running, and say what to type next."""
        from peerscale.submission import submit

        submit(cells, self.config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Hydra's way in, which waits for results; refused, as other sweepers know no cells to come back to."""
        from peerscale.config_errors import ConfigError

        raise ConfigError("hydra/launcher=slurm goes with hydra/sweeper=isoflop only")
