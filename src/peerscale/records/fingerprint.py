"""The fingerprint of a cell: a hash of everything that determines its result."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from peerscale.config.schema import NOT_HASHED, Config, to_dict
from peerscale.plan.plan import Plan

RECIPE_VERSION = 1
"""Increase this when the numerics of training change, so that old cells are not taken for new ones."""

NAMES = (
    "ffn.variant", "ffn.params_of.variant", "data.source", "optim.lr_rule", "optim.lr_law", "optim.lr_factor",
    "optim.table_lr_law", "optim.table_eps",
)  # fmt: skip
"""Keys that are not hashed because the values that they stand for are: layer settings, tokens, learning rates."""

ADDED_LATER: dict[str, Any] = {
    "routing_group_sequences": None, "ffn.initial_output_scale": 1.0, "dense": "dense",
}  # fmt: skip
"""Keys that older configurations do not have, with the values that have the same effect as their absence. A key is
hashed only if it has another value, so that the fingerprints of finished cells do not change."""


def hashed_config(config: Config, plan: Plan, data_fingerprint: str) -> dict[str, Any]:
    """The resolved values that determine the result: configuration, learning rates, corpus and recipe version."""
    tree = to_dict(config)
    tree["routing_group_sequences"] = config.routing_group_sequences if config.n_routing_groups > 1 else None
    for key in (*NOT_HASHED, *NAMES):
        remove_key(tree, key)
    if not config.n_dense:
        del tree["dense"]
    for key, usual in ADDED_LATER.items():
        remove_key(tree, key, usual)
    tree["optim"] |= {"lr": plan.lr, "table_lr": plan.table_lr, "schedule": "cosine"}
    if config.table_eps != config.optim.eps:
        tree["optim"]["table_eps"] = config.table_eps
    if config.trainer.tf32 and config.trainer.accelerator == "gpu":
        tree["tf32"] = True
    for key in ("d_model", "head_dim", "n_layers"):
        del tree[key]
    tree["size"] = {"d_model": config.d_model, "n_layers": config.n_layers, "n_heads": config.n_heads}
    tree["data"]["evaluation"] = {name: tokens for name, tokens in tree["data"]["evaluation"].items() if tokens}
    tree["replaced"] = list(config.replaced_blocks)
    return {**tree, "data_fingerprint": data_fingerprint, "recipe_version": RECIPE_VERSION}


def fingerprint(hashed: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of the SHA-256 of the canonical JSON."""
    return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()[:16]


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ, each as `key old -> new`; hashes of code in words."""
    differences = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            differences += differing_keys(before, after, f"{prefix}{key}.")
        elif key == "source_sha256" and before and after and before != after:
            differences.append(f"{prefix}{key} (the code of the layer's module changed)")
        elif before != after:
            differences.append(f"{prefix}{key} {before!r} -> {after!r}")
    return differences


def remove_key(tree: dict[str, Any], key: str, *only: Any) -> None:
    """Remove a dotted key if it is there; with `only`, just if it has that value."""
    *sections, name = key.split(".")
    for section in sections:
        tree = tree.get(section, {})
    if name in tree and (not only or tree[name] == only[0]):
        del tree[name]
