"""The trained model of a finished cell: its configuration and its weights after the last step."""

import json
from pathlib import Path

import torch
import yaml
from torch import Tensor

from peerscale.config.schema import Config, parse_config
from peerscale.errors import UserError
from peerscale.layers.registry import dump_layer

CHECKPOINTS = "checkpoints"
"""Folder of checkpoints inside a cell's folder."""

PREFIX = "model."
"""Prefix of the model's parameter names in a checkpoint."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """The file of the checkpoint after a step."""
    return folder / f"step-{step:09d}.ckpt"


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    return sorted(folder.glob("step-*.ckpt"), reverse=True)


def read_trained(folder: Path) -> tuple[Config, dict[str, Tensor]]:
    """Configuration and weights of the finished cell in `folder`; the weights are on the CPU.

    Raises:
        UserError: the folder holds no finished cell, or one without a checkpoint of its last step, or with a damaged
            one, or one whose layer's module has changed since.
    """
    try:
        tree = dict(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
        record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
        status, steps, source = record["status"], record["plan"]["steps"], tree["ffn"].get("source_sha256")
    except OSError as error:
        raise UserError(f"{folder} is not the folder of a cell: it has no {Path(error.filename).name}") from None
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{folder}: config.yaml or record.json is damaged ({type(error).__name__})") from None
    config = parse_config(tree)
    if status != "done":
        raise UserError(f"{folder}: the cell is {status}; only one that is done can be loaded")
    if source != dump_layer(config.ffn).get("source_sha256"):
        raise UserError(
            f"{folder}: {tree['ffn'].get('class')} is in a file that was changed since the cell was trained"
        )
    last = checkpoint_path(folder / CHECKPOINTS, steps)
    if not last.is_file():
        raise UserError(
            f"{folder} kept no checkpoint; to train the cell again and keep it, move this folder away and add "
            "trainer.keep_checkpoint=true to the command"
        )
    try:
        state = torch.load(last, map_location="cpu", weights_only=True)["state_dict"]
    except Exception as error:  # a damaged archive can raise many types of errors
        raise UserError(f"{last} cannot be read ({type(error).__name__})") from None
    return config, {name.removeprefix(PREFIX): weight for name, weight in state.items()}
