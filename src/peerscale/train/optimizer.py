"""How each parameter is trained: learning rate, weight decay and clipping are decided only here."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peerscale.config.schema import Config
from peerscale.ops.row_sparse_adamw import RowSparseAdamW
from peerscale.plan.plan import Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterGroups:
    """The trainable parameters of a model, each in exactly one group."""

    matrices: list[nn.Parameter]
    """With weight decay, inside the gradient-norm clip."""
    vectors: list[nn.Parameter]
    """Norms and biases: no weight decay, inside the clip."""
    tables: list[nn.Parameter]
    """Expert tables and PKM values: their own learning rate, no weight decay, outside the clip, since the gradient of a
    row depends only on the few tokens that retrieved it."""

    @property
    def clipped(self) -> list[nn.Parameter]:
        return [*self.matrices, *self.vectors]


def parameter_groups(model: nn.Module) -> ParameterGroups:
    """Sort a model's parameters into groups; tables are those that a layer's optional `expert_tables()` lists."""
    owners = [own for module in model.modules() if callable(own := getattr(module, "expert_tables", None))]
    tables = dict.fromkeys(table for own in owners for table in own())  # a layer may pass on those of a part
    others = [p for p in model.parameters() if p not in tables]
    return ParameterGroups(
        matrices=[p for p in others if p.ndim >= 2], vectors=[p for p in others if p.ndim < 2], tables=[*tables]
    )


def build_optimizer(groups: ParameterGroups, config: Config, plan: Plan) -> torch.optim.Optimizer:
    """AdamW over the groups; the learning rates are peak rates, which the schedule scales."""
    optim = config.optim
    settings: list[dict[str, Any]] = [{"params": groups.matrices, "lr": plan.lr, "weight_decay": optim.weight_decay}]
    settings.append({"params": groups.vectors, "lr": plan.lr, "weight_decay": 0.0})
    if groups.tables:
        tables = {"params": groups.tables, "lr": plan.table_lr or plan.lr, "weight_decay": 0.0}
        settings.append({**tables, "row_sparse": True} if optim.name == "row_sparse_adamw" else tables)
    kind = RowSparseAdamW if optim.name == "row_sparse_adamw" else torch.optim.AdamW
    return kind(settings, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)
