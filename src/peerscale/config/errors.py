"""Errors of Hydra, OmegaConf and pydantic about a configuration, each turned into one line that a user understands."""

import difflib
import itertools
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from peerscale.errors import ConfigError as ConfigError
from peerscale.layers.base import FfnConfig
from peerscale.layers.registry import known_layers, layer_class, method_of

T = TypeVar("T")


def parse(adapter: TypeAdapter[T], root: type, tree: Mapping[str, Any], section: str = "") -> T:
    """Make a `root` from a nested mapping (the file, or its `section`); raises `ConfigError` for the first mistake."""
    try:
        return adapter.validate_python(tree)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(one_line(first, root, section, method_in(tree))) from None


def method_in(tree: Mapping[str, Any]) -> str | None:
    """The `method` of the layer in a configuration that may have mistakes; None if it cannot be determined."""
    try:
        return method_of(layer_class(tree["ffn"]))
    except (ConfigError, KeyError, AttributeError, TypeError):
        return None


def one_line(problem: Mapping[str, Any], root: type, section: str = "", layer: str | None = None) -> str:
    """One line for pydantic's error `problem` about a `root`, which is the user's file or a `section` of it.

    `layer` is the `ffn.method` of the configuration, if known.
    """
    parts = [str(part) for part in problem["loc"]]
    where = ".".join([*([section] if section else []), *parts])
    given = problem["input"]
    message = problem["msg"].removeprefix("Value error, ")
    match problem["type"]:
        case "unexpected_keyword_argument":
            if section:
                return f"unknown key {where}; there are: {', '.join(_siblings(parts, root))}"
            return unknown_key(where, root, layer)
        case "missing":
            return f"{where}: missing"
        case "value_error":
            return f"{where}: {message}" if problem["loc"] else message
        case _:
            return f"{where}: {message[0].lower()}{message[1:]}, not {given!r}"


def unknown_key(key: str, root: type, layer: str | None = None) -> str:
    """The message about an unknown key: which layers have it, or the nearest keys.

    Args:
        key: dotted.
        root: the dataclass that was to hold it.
        layer: the `ffn.method` of the configuration, if known.
    """
    if key.partition(".")[0] == "sweep":
        return f"unknown key {key}; only a study has it: make sweep SWEEP=NAME OVERRIDES=..."
    known = dict.fromkeys(_keys(root))
    if key in known:
        owners = layers_with(key)
        if owners and layer not in owners:
            return f"unknown key {key}; {layer or 'the layer'} does not have it, only {', '.join(owners)}"
        return f"unknown key {key}; the files of conf/ in use do not list it; to add it: ++{key}=VALUE"
    own = [name for name in known if layer is None or layer in (layers_with(name) or [layer])]
    near = difflib.get_close_matches(key, own, n=3)
    return f"unknown key {key}; " + (
        f"did you mean {' or '.join(near)}?" if near else "see conf/ for the keys there are"
    )


def layers_with(key: str) -> list[str]:
    """The `ffn.method` of every layer that has `key`, such as `ffn.top_k`; empty if `key` belongs to no layer."""
    group, _, name = key.partition(".")
    return [method for method, kind in known_layers().items() if group == "ffn" and name in {*_keys(kind)}]


def _siblings(parts: list[str], root: type) -> list[str]:
    """The names of all fields in the section that `parts` point to."""
    prefix = "".join(f"{part}." for part in parts[:-1] if not part.isdigit())
    keys = [key.removeprefix(prefix) for key in _keys(root) if key.startswith(prefix)]
    return [key for key in keys if "." not in key]


def _keys(kind: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of a dataclass, of the members of a union or the items of a list; an `FfnConfig` can be any layer."""
    if typing.get_origin(kind) is Annotated:
        kind = typing.get_args(kind)[0]
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) in (typing.Union, list):
        for member in typing.get_args(kind):
            yield from _keys(member, prefix)
    elif kind is FfnConfig and prefix.count(".") < 3:  # no deeper than a layer inside a layer, such as `ffn.params_of`
        for layer in known_layers().values():
            yield from _keys(layer, prefix)
    elif is_dataclass(kind):
        hints = typing.get_type_hints(kind, include_extras=True)
        for field in fields(kind):
            yield f"{prefix}{field.name}"
            yield from _keys(hints[field.name], f"{prefix}{field.name}.")


def of_composition(error: Exception) -> bool:
    """Whether an error comes from Hydra, OmegaConf or YAML and concerns what a user wrote."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    # Hydra raises a ValueError for overrides such as size=null.
    hydras = type(error) is ValueError and str(error).startswith("Config group override")
    return hydras or isinstance(error, HydraException | OmegaConfBaseException | YAMLError)


def first_line(error: Exception, root: type, layer: Callable[[], str | None]) -> str:
    """An error of Hydra, OmegaConf or YAML, which has several lines, in one line.

    Args:
        error: what was raised.
        root: the dataclass that was to be made.
        layer: returns the `ffn.method` of the configuration, or None if it cannot be determined.
    """
    from hydra.errors import MissingConfigException, OverrideParseException
    from yaml import MarkedYAMLError

    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        return f"unknown choice {group}={choice}; there are: {', '.join(error.options)}"
    if isinstance(error, MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return f"{mark.name}:{mark.line + 1}: not valid YAML: {error.problem}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith("Could not override '"):
        key = lines[0].split("'")[1]
        return unknown_key(key, root, layer() if key.startswith("ffn.") else None)
    hints = ("Set the environment variable", "full_key:", "object_type=", "To append to your config", "See https://")
    kept = [line for line in lines if not line.startswith(hints)]
    kept = list(itertools.takewhile(lambda line: not line.startswith("Config search path"), kept))
    given = f"override {error.override}: " if isinstance(error, OverrideParseException) else ""
    return given + " ".join(kept)
