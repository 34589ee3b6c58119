"""The LightningModule: loss, batches, optimiser, gradient clipping."""

import logging
import warnings
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from peerscale.config.schema import Config
from peerscale.data.batches import TrainBatches
from peerscale.data.store import open_corpus
from peerscale.model.build import build_model
from peerscale.ops.cross_entropy import linear_cross_entropy
from peerscale.plan.plan import Plan
from peerscale.train.loader import StepLoader
from peerscale.train.memory import keep_freed_memory
from peerscale.train.optimizer import build_optimizer, build_scheduler, parameter_groups


class LanguageModel(lightning.LightningModule):
    """Next-token prediction with the model of a configuration, whose weights are drawn from its seed."""

    def __init__(self, config: Config, plan: Plan, device: str = "cpu") -> None:
        """`device` is the type of the device for training."""
        super().__init__()
        self.config, self.plan = config, plan
        lightning.seed_everything(config.seed, verbose=False)
        self.model = build_model(config, device)
        self.groups = parameter_groups(self.model)
        self.grad_norm = torch.zeros(())  # of the last step, before the clip, without expert tables

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called where one of several processes begins, before Lightning says anything."""
        prepare_process(state["config"])
        super().__setstate__(state)

    def setup(self, stage: str) -> None:
        """Called in each process that trains."""
        if self.config.trainer.compiles_on(self.trainer.strategy.root_device.type):
            self.model.compile_backbone()

    def losses(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the next tokens in nats: tokens (B, T + 1) -> the mean (for training) and each (B, T)."""
        model, targets_BT = self.model, tokens[:, 1:]
        x_TD = model.features(tokens[:, :-1]).flatten(0, 1)
        mean, losses_T = linear_cross_entropy(x_TD, model.embedding.weight, targets_BT.flatten(), model.operators)
        return mean, losses_T.view(targets_BT.shape)

    def training_step(self, tokens: Tensor, batch_idx: int) -> dict[str, Tensor]:
        cross_entropy, _ = self.losses(tokens)
        auxiliary = self.model.auxiliary_loss()
        loss = cross_entropy if auxiliary is None else cross_entropy + auxiliary
        return {"loss": loss, "cross_entropy": cross_entropy.detach()}

    def train_dataloader(self) -> StepLoader:
        """The batches of all steps; each of several devices has its share of every batch."""
        config, trainer = self.config, self.trainer
        tokens = open_corpus(config.data).tokens("train")
        batches = TrainBatches(tokens, seed=config.seed, batch_sequences=config.batch_sequences, context=config.context)
        return StepLoader(
            batches,
            self.plan.steps,
            config.surroundings.micro_batches,
            rank=trainer.global_rank,
            n_ranks=trainer.world_size,
            pin_memory=trainer.strategy.root_device.type == "cuda",
        )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = build_optimizer(self.groups, self.config, self.plan)
        scheduler = build_scheduler(optimizer, self.config, self.plan)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The optimiser's step, and then those of the layers that change what has no gradient."""
        super().optimizer_step(*args, **kwargs)
        for module in self.model.modules():
            if callable(after_step := getattr(module, "after_step", None)):
                after_step()

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.groups.clipped, self.config.optim.grad_clip)


def prepare_process(config: Config) -> None:
    """Set the threads and the memory allocation of a process that trains; Lightning says only what went wrong."""
    torch.set_num_threads(config.trainer.threads)
    tf32 = config.trainer.tf32 and config.trainer.accelerator == "gpu"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    keep_freed_memory()
    warnings.filterwarnings("ignore", module="lightning")
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
