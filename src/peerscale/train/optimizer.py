"""How each parameter is trained: learning rate, weight decay and clipping are decided only here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from peerscale.config.schema import Config
from peerscale.layers.base import OwnTraining
from peerscale.ops.row_sparse_adamw import RowSparseAdamW
from peerscale.plan.plan import Plan, schedule


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
    own: dict[nn.Parameter, OwnTraining]
    """What layers state of some of these parameters."""

    @property
    def clipped(self) -> list[nn.Parameter]:
        return [*self.matrices, *self.vectors]


def parameter_groups(model: nn.Module) -> ParameterGroups:
    """Sort a model's parameters into groups, by what its layers state (`layers.base.FfnConfig.build`)."""
    tables = dict.fromkeys(table for listed in _stated(model, "expert_tables") for table in listed)
    others = [p for p in model.parameters() if p not in tables]
    return ParameterGroups(
        matrices=[p for p in others if p.ndim >= 2],
        vectors=[p for p in others if p.ndim < 2],
        tables=[*tables],
        own={parameter: own for stated in _stated(model, "own_training") for parameter, own in stated.items()},
    )


def _stated(model: nn.Module, method: str) -> list[Any]:
    """What each module says that has the method; a layer may pass on what a part of it says."""
    return [stated() for module in model.modules() if callable(stated := getattr(module, method, None))]


def build_optimizer(groups: ParameterGroups, config: Config, plan: Plan) -> torch.optim.Optimizer:
    """AdamW over the groups; the learning rates are peak rates, which the schedule scales."""
    optim = config.optim
    of_tables = {"tables": True, "eps": config.table_eps}
    if optim.name == "row_sparse_adamw":
        of_tables["row_sparse"] = True
    settings = [
        *_alike(groups.matrices, groups.own, plan.lr, optim.weight_decay),
        *_alike(groups.vectors, groups.own, plan.lr, 0.0),
        *[group | of_tables for group in _alike(groups.tables, groups.own, plan.table_lr or plan.lr, 0.0)],
    ]
    kind = RowSparseAdamW if optim.name == "row_sparse_adamw" else torch.optim.AdamW
    return kind(settings, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)


def _alike(
    parameters: list[nn.Parameter], own: dict[nn.Parameter, OwnTraining], lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """The optimiser's groups: one for all parameters that nothing is stated of, and one for each kind of statement."""
    alike: dict[OwnTraining, list[nn.Parameter]] = {}
    for parameter in parameters:
        alike.setdefault(own.get(parameter, OwnTraining()), []).append(parameter)
    return [
        {
            "params": members,
            "lr": lr * stated.lr_factor,
            "weight_decay": weight_decay if stated.weight_decay is None else stated.weight_decay,
            "final_lr_factor": stated.final_lr_factor,
        }
        for stated, members in alike.items()
    ]


def build_scheduler(optimizer: torch.optim.Optimizer, config: Config, plan: Plan) -> LambdaLR:
    """The schedule of the learning rates of all groups, step by step."""

    def of(final_factor: float) -> Callable[[int], float]:
        last = max(1, plan.steps - 1)
        return lambda step: schedule(config, plan, step) * (1 + (final_factor - 1) * min(1.0, step / last))

    return LambdaLR(optimizer, [of(group["final_lr_factor"]) for group in optimizer.param_groups])
