"""The LightningModule: loss, optimiser, gradient clipping."""

from typing import Any

import lightning
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from peerscale.config.schema import Config
from peerscale.model.build import build_model
from peerscale.ops.cross_entropy import linear_cross_entropy
from peerscale.plan.plan import Plan, schedule
from peerscale.train.optimizer import build_optimizer, parameter_groups
from peerscale.train.ranks import mean_over_ranks


class LanguageModel(lightning.LightningModule):
    """Next-token prediction with the model of a configuration."""

    def __init__(self, config: Config, plan: Plan, device: str = "cpu") -> None:
        """`device` is the type of the device for training."""
        super().__init__()
        self.config, self.plan = config, plan
        self.model = build_model(config, device)
        self.groups = parameter_groups(self.model)

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
        return {"loss": loss, "cross_entropy": mean_over_ranks(cross_entropy.detach())}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = build_optimizer(self.groups, self.config, self.plan)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(self.config, self.plan, step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        torch.nn.utils.clip_grad_norm_(self.groups.clipped, self.config.optim.grad_clip)
