"""The trained model of a finished cell, and the names of its checkpoints."""

from dataclasses import replace
from pathlib import Path

import torch
import yaml

from peerscale.config.schema import parse_config
from peerscale.errors import UserError
from peerscale.layers.registry import dump_layer
from peerscale.model.build import build_model
from peerscale.model.transformer import Transformer
from peerscale.records.record import RECORD, Status, read_record

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


def load_model(folder: str | Path) -> Transformer:
    """The trained model of a finished cell, on the CPU and in evaluation mode.

    Args:
        folder: of the cell, `runs/<sweep>/<cell>`, trained with `trainer.keep_checkpoint=true`.

    Raises:
        UserError: the folder holds no finished cell, or one without a checkpoint of its last step, or with a damaged
            one, or one whose layer's module has changed since.
    """
    folder = Path(folder)
    record = read_record(folder)
    if record is None:
        raise UserError(f"{folder} is not the folder of a cell: it has no {RECORD}")
    if record.status is not Status.DONE:
        raise UserError(f"{folder}: the cell is {record.status}; only one that is done can be loaded")
    try:
        tree = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{folder / 'config.yaml'} cannot be read ({type(error).__name__})") from None
    config = parse_config(tree)
    if tree["ffn"].get("source_sha256") != dump_layer(config.ffn).get("source_sha256"):
        raise UserError(f"{folder}: {tree['ffn']['class']} is in a file that was changed since the cell was trained")
    last = checkpoint_path(folder / CHECKPOINTS, record.plan["steps"])
    if not last.is_file():
        raise UserError(
            f"{folder} kept no checkpoint; to train the cell again and keep it, move this folder away and add "
            "trainer.keep_checkpoint=true to the command"
        )
    # Where it was trained does not matter to the weights, and its kernel may not run here.
    trainer = replace(config.trainer, kernel="auto", devices=1, micro_batches=None, compile=False)
    model = build_model(replace(config, trainer=trainer))
    try:
        state = torch.load(last, map_location="cpu", weights_only=True)["state_dict"]
    except Exception as error:  # a damaged archive can raise many types of errors
        raise UserError(f"{last} cannot be read ({type(error).__name__})") from None
    model.load_state_dict({name.removeprefix(PREFIX): weight for name, weight in state.items()})
    return model.eval()
