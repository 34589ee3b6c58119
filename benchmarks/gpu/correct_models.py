"""Whether a small model of each method has the loss and the gradients of the `reference` in float64, and whether its
training step waits for the GPU.
"""

from collections.abc import Mapping

import torch
from gpu.machine import Machine
from torch import Tensor

from peerscale.config.schema import load
from peerscale.plan.plan import plan
from peerscale.train.module import LanguageModel
from peerscale.train.optimizer import build_optimizer

METHODS = ("dense", "moe", "moe_token_choice", "pkm", "peer")

LOSS, GRADIENT, BF16_LOSS = 1e-5, 2e-2, 1e-2
"""Allowed distances: of the loss and of each parameter's gradient in fp32, by their own norm; of the loss in bf16.
Where two experts are nearly equal, rounding decides on a token, which shows in gradients; a wrong operator shows far
more."""


def overrides(method: str, rehearse: bool) -> list[str]:
    """A model of two blocks; routing takes its statistics over 16 sequences."""
    size = ["d_model=16", "context=8"] if rehearse else ["d_model=128", "head_dim=64", "context=64"]
    words = [f"ffn={method}", *size, "n_layers=2", "batch_sequences=32", "routing_group_sequences=16"]
    if method in ("pkm", "peer"):
        words += ["ffn.n_experts=64", "ffn.n_heads=1", "ffn.top_k=4"] if rehearse else ["ffn.n_experts=4096"]
    return [*words, "budget=1e12", "data.vocab_size=512", "tracking=disabled"]


def checks(machine: Machine, method: str) -> list[tuple[str, float]]:
    """What was compared, and its error as a multiple of what is allowed."""
    ours, reference = (_model(machine, method, kernel) for kernel in (machine.kernel, "reference"))
    ours.load_state_dict(reference.state_dict())
    reference.double()
    config = ours.config
    with torch.device(machine.type):
        tokens = torch.randint(config.data.vocab_size, (config.batch_sequences, config.context + 1))
    loss, gradients = _loss_and_gradients(ours, tokens)
    expected_loss, expected = _loss_and_gradients(reference, tokens)
    found = [("loss", abs(loss - expected_loss) / expected_loss / LOSS)]
    found += [(f"gradient of {name}", _distance(gradients, expected, name) / GRADIENT) for name in expected]
    with machine.autocast("bf16"):
        half_loss, _ = _loss_and_gradients(ours, tokens)
    found.append(("loss in bf16", abs(half_loss - expected_loss) / expected_loss / BF16_LOSS))
    return [*found, ("no wait in a step in bf16", float("inf") if _waits(machine, ours, tokens) else 0.0)]


def _waits(machine: Machine, module: LanguageModel, tokens: Tensor) -> bool:
    """Whether the host waits for the GPU in a step; in fp32 grouped products would (docs/cluster.md)."""
    optimizer = build_optimizer(module.groups, module.config, module.plan)
    try:
        for mode in ("default", "error"):  # kernels are compiled in the first step
            if machine.type == "cuda":
                torch.cuda.set_sync_debug_mode(mode)
            with machine.autocast("bf16"):
                loss = module.training_step(tokens, 0)["loss"]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.groups.clipped, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    except RuntimeError as error:
        print(f"a step waits: {error}", flush=True)
        return True
    finally:
        if machine.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return False


def _model(machine: Machine, method: str, kernel: str) -> LanguageModel:
    config = load([*overrides(method, machine.rehearse), f"trainer.kernel={kernel}"])
    return LanguageModel(config, plan(config), machine.type).to(machine.type)


def _loss_and_gradients(module: LanguageModel, tokens: Tensor) -> tuple[float, dict[str, Tensor]]:
    module.zero_grad()
    loss = module.training_step(tokens, 0)["loss"]
    loss.backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in module.named_parameters() if parameter.grad is not None
    }
    return loss.item(), gradients


def _distance(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], name: str) -> float:
    """Of a parameter's gradient, over the largest of all its like or its own norm."""
    if name not in actual or not actual[name].isfinite().all():
        return float("inf")
    norm = expected[name].norm().item()
    if norm < 1e-9:  # a bias before BatchNorm has none but rounding
        return actual[name].norm().item()
    return (actual[name].double() - expected[name]).norm().item() / norm
