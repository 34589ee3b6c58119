"""The LightningModule: loss, optimiser, clip."""

from typing import Any

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from peerscale.config import Config
from peerscale.kernels.backends import operators_for
from peerscale.kernels.cross_entropy import linear_cross_entropy
from peerscale.model import build_model
from peerscale.model.ranks import mean_over_ranks
from peerscale.plan import Plan, schedule
from peerscale.training.optimizer import build_optimizer, parameter_groups


class LanguageModel(lightning.LightningModule):
    """Next-token prediction with the model of a configuration."""

    def __init__(self, config: Config, plan: Plan) -> None:
        super().__init__()
        self.config, self.plan = config, plan
        self.model = build_model(config)
        self.groups = parameter_groups(self.model)

    def losses(self, tokens: Tensor) -> Tensor:
        """Cross-entropy in nats of each next token: tokens (B, T + 1) -> (B, T)."""
        targets_BT = tokens[:, 1:]
        logits = self.model(tokens[:, :-1]).float()
        return F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten(), reduction="none").view(targets_BT.shape)

    def training_step(self, tokens: Tensor, batch_idx: int) -> dict[str, Tensor]:
        x_TD = self.model.features(tokens[:, :-1]).flatten(0, 1)
        operators = operators_for(self.config.trainer.kernel, tokens.device.type)
        cross_entropy = linear_cross_entropy(x_TD, self.model.embedding.weight, tokens[:, 1:].flatten(), operators)
        auxiliary = self.model.auxiliary_loss()
        loss = cross_entropy if auxiliary is None else cross_entropy + auxiliary
        return {"loss": loss, "cross_entropy": mean_over_ranks(cross_entropy.detach())}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = build_optimizer(self.groups, self.config, self.plan)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(self.config, self.plan, step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        torch.nn.utils.clip_grad_norm_(self.groups.clipped, self.config.optim.grad_clip)
