"""The checkpoints of a cell, and the trained model of a finished one."""

import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from peerscale.config.schema import parse_config
from peerscale.errors import UserError
from peerscale.layers.registry import dump_layer
from peerscale.model.build import build_model
from peerscale.model.transformer import Transformer
from peerscale.plan.plan import plan
from peerscale.records.fingerprint import differing_keys, hashed_config
from peerscale.records.record import RECORD, Status, read_record

CHECKPOINTS = "checkpoints"
"""Folder of checkpoints inside a cell's folder."""

MADE_BY = "fingerprint"
"""Key of a checkpoint: the fingerprint of its run."""

PREFIX = "model."
"""Prefix of the model's parameter names in a checkpoint."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """The file of the checkpoint after a step."""
    return folder / f"step-{step:09d}.ckpt"


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    return sorted(folder.glob("step-*.ckpt"), reverse=True)


def read_checkpoint(path: Path, made_by: str) -> dict[str, Any]:
    """The content of a checkpoint of the run with fingerprint `made_by`.

    No code in the file is run: only weights and plain values are loaded, and any other pickle is refused.

    Raises:
        UserError: it is damaged, or is not of this run or of the step in its name.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch itself does not compare checksums
                raise zipfile.BadZipFile(f"bad checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        step, maker = state["global_step"], state[MADE_BY]
    except Exception as error:  # a damaged archive can raise many types of errors
        raise UserError(f"{path} cannot be read ({type(error).__name__})") from None
    if maker != made_by:
        raise UserError(f"{path} is of another configuration")
    if path != checkpoint_path(path.parent, step):
        raise UserError(f"{path} is of step {step}")
    return state


def load_model(folder: str | Path) -> Transformer:
    """The trained model of a finished cell, on the CPU and in evaluation mode.

    Args:
        folder: of the cell, `runs/<sweep>/<cell>`, trained with `trainer.keep_checkpoint=true`.

    Raises:
        UserError: the folder holds no finished cell, or one without a checkpoint of its last step, or with a damaged
            one, or one whose configuration or layer's module has changed since.
    """
    folder = Path(folder)
    record = read_record(folder)
    if record is None:
        raise UserError(f"{folder} is not the folder of a cell: it has no {RECORD}")
    if record.status is not Status.DONE:
        raise UserError(f"{folder}: the cell is {record.status}; only one that is done can be loaded")
    try:
        tree = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{folder / 'config.yaml'} cannot be read ({type(error).__name__})") from None
    config = parse_config(tree)
    if tree["ffn"].get("source_sha256") != dump_layer(config.ffn).get("source_sha256"):
        raise UserError(f"{folder}: {tree['ffn']['class']} is in a file that was changed since the cell was trained")
    trained = {key: record.hashed_config[key] for key in ("data_fingerprint", "recipe_version")}
    if differ := differing_keys(record.hashed_config, hashed_config(config, plan(config), "") | trained):
        raise UserError(f"{folder / 'config.yaml'} is not that of {RECORD}: {'; '.join(differ)}")
    last = checkpoint_path(folder / CHECKPOINTS, record.plan["steps"])
    if not last.is_file():
        raise UserError(
            f"{folder} kept no checkpoint; to train the cell again and keep it, move this folder away and add "
            "trainer.keep_checkpoint=true to the command"
        )
    # Where it was trained does not matter to the weights, and its kernel may not run here.
    trainer = replace(config.trainer, kernel="auto", devices=1, micro_batches=None, compile=False)
    model = build_model(replace(config, trainer=trainer))
    state = read_checkpoint(last, record.fingerprint)["state_dict"]
    model.load_state_dict({name.removeprefix(PREFIX): weight for name, weight in state.items()})
    return model.eval()
