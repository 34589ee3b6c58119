"""What Hydra, OmegaConf and pydantic have against a configuration, in one line of the user's terms."""

import difflib
import itertools
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Annotated, Any

from peerscale.errors import UserError


class ConfigError(UserError):
    """A configuration that cannot be run: the key, what was given, what is allowed."""


def one_line(problem: Mapping[str, Any], root: type) -> str:
    """The first of pydantic's complaints about a `root`."""
    # The tag of a union of layers stands in pydantic's location after its key; the user's key has no such part.
    loc = [str(part) for part in problem["loc"]]
    where = ".".join(part for i, part in enumerate(loc) if i == 0 or loc[i - 1] not in ("ffn", "params_of"))
    given = problem["input"]
    where = where or "sweep"  # of a configuration Hydra makes sure that it is a mapping
    message = problem["msg"].removeprefix("Value error, ")
    match problem["type"]:
        case "unexpected_keyword_argument" | "extra_forbidden":
            return unknown_key(where, root)
        case "missing" | "missing_argument" | "missing_keyword_only_argument":
            return f"{where}: missing"
        case "value_error":
            return f"{where}: {message}" if problem["loc"] else message
        case "dataclass_type":
            return f"{where}: input should be a mapping, not {given!r}"
        case "too_short":
            return f"{where}: {message[0].lower()}{message[1:].partition(' after')[0]}, not {given!r}"
        case _:
            return f"{where}: {message[0].lower()}{message[1:]}, not {given!r}"


def unknown_key(key: str, root: type) -> str:
    """What to say of a key that there is none of: the nearest there are."""
    near = difflib.get_close_matches(key, dict.fromkeys(_keys(root)), n=3)
    return f"unknown key {key}; " + (
        f"did you mean {' or '.join(near)}?" if near else "see conf/ for the keys there are"
    )


def _keys(kind: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of a dataclass, and of every member of a union of them."""
    if typing.get_origin(kind) is Annotated:
        kind = typing.get_args(kind)[0]
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        for member in typing.get_args(kind):
            yield from _keys(member, prefix)
    elif is_dataclass(kind):
        hints = typing.get_type_hints(kind, include_extras=True)
        for field in fields(kind):
            yield f"{prefix}{field.name}"
            yield from _keys(hints[field.name], f"{prefix}{field.name}.")


def first_line(error: Exception, root: type) -> str:
    """An error of Hydra, OmegaConf or YAML, which takes several lines, in one."""
    from hydra.errors import MissingConfigException, OverrideParseException
    from yaml import MarkedYAMLError

    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        return f"unknown choice {group}={choice}; there are: {', '.join(error.options)}"
    if isinstance(error, MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return f"{mark.name}:{mark.line + 1}: no valid YAML: {error.problem}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    dull = ("Set the environment variable", "full_key:", "object_type=", "To append to your config", "See https://")
    if lines and lines[0].startswith("Could not override '"):
        return unknown_key(lines[0].split("'")[1], root)
    if lines and lines[0].startswith("Ambiguous value for argument '"):
        given = lines[0].split("'")[1]
        return f"{given} names several values; that is for a study to do (sweeps/), and a text with a comma is quoted"
    if lines and lines[0].startswith("Config group override must be"):
        return f"a group of conf/ takes the name of one of its files, such as size=d32, not {lines[0].split()[-1]}"
    kept = [line for line in lines if not line.startswith(dull)]
    kept = list(itertools.takewhile(lambda line: not line.startswith("Config search path"), kept))
    given = f"override {error.override}: " if isinstance(error, OverrideParseException) else ""
    return given + " ".join(kept).replace("must be a DictConfig, got ListConfig", "must be a mapping, not a list") or (
        type(error).__name__
    )
