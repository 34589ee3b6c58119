"""Whole training steps of every method, as a study takes them but without Lightning: counted FLOPs per second, their
share of the rate of a bf16 product, and the most memory that tensors took beside what the plan expects.

Tokens are random. Experts are as in `sweeps/isoflop_gpu.yaml`: 256 x 256, 64 of them active.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from gpu.ceilings import product_rate, share
from gpu.machine import Machine
from gpu.results import Case, Row
from timing import spread
from training_step import training_step

from peerscale.config.schema import load
from peerscale.plan.cost import cost
from peerscale.plan.memory import device_memory

METHODS = ("dense", "peer", "pkm", "moe", "moe_token_choice")
SIZES = {"d256-l8-h4": (256, 8), "d512-l8-h8": (512, 8), "d768-l12-h12": (768, 12)}
"""d_model and n_layers; heads have width 64."""
VOCABULARIES = (8192, 32768)
SEQUENCES = (32, 128)
CONTEXT = 512


def cases(machine: Machine, folder: Path) -> Iterator[Case]:
    """Every method at every size, vocabulary and batch; small ones first."""
    sizes, vocabularies, sequences = SIZES, VOCABULARIES, SEQUENCES
    if machine.rehearse:
        sizes, vocabularies, sequences = {"d16": (16, 2)}, (512,), (16,)
    for size, (d_model, n_layers) in sizes.items():
        for batch in sequences:
            for vocabulary in vocabularies:
                for method in METHODS:
                    words = overrides(machine, method, vocabulary, batch)
                    words += [f"d_model={d_model}", f"n_layers={n_layers}"]
                    labels = {"method": method, "size": size, "vocabulary": vocabulary, "sequences": batch}
                    name = f"{method} {size} V{vocabulary} B{batch}"
                    yield Case(name, labels, partial(measure, machine, folder, words))


def overrides(machine: Machine, method: str, vocabulary: int, batch: int) -> list[str]:
    """The configuration; statistics of routing are taken over 32 sequences, whatever the batch."""
    words = [f"ffn={method}", f"data.vocab_size={vocabulary}", f"batch_sequences={batch}"]
    words += ["context=8"] if machine.rehearse else [f"context={CONTEXT}", "head_dim=64"]
    words += [f"routing_group_sequences={min(batch, 32)}", "precision=bf16", "budget=1e15"]
    if method in ("pkm", "peer"):
        words += (
            ["ffn.n_experts=64", "ffn.n_heads=1", "ffn.top_k=4"]
            if machine.rehearse
            else ["ffn.n_experts=65536", "ffn.n_heads=4"]
        )
    return [*words, "tracking=disabled", f"trainer.kernel={machine.kernel}"]


def measure(machine: Machine, folder: Path, words: list[str]) -> Row:
    """Seconds of a step, and what follows from them."""
    config = load(words)
    torch.manual_seed(0)
    times = spread(machine.seconds(training_step(config, machine.type)))
    planned = device_memory(config)
    flops_per_s = cost(config).flops_per_token * config.tokens_per_step / times["median_s"]
    return {
        **times,
        "tokens_per_s": config.tokens_per_step / times["median_s"],
        "flops_per_s": flops_per_s,
        "of_product": share(flops_per_s, product_rate(folder, "bf16")),
        "peak_bytes": machine.peak_bytes(),
        "planned_bytes": sum(planned.values()),
        "planned_state_bytes": planned["state"],
    }
