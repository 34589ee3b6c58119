"""Errors of Hydra, OmegaConf, YAML and pydantic: their own message in one line, and the nearest name to a wrong one."""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from peerscale.errors import ConfigError as ConfigError

T = TypeVar("T")

OTHER_NAMES = {"size": "d_model", "width": "d_model"}
"""Other words for keys."""


def parse(adapter: TypeAdapter[T], tree: Mapping[str, Any], where: str = "", names: Iterable[str] = ()) -> T:
    """The object that a nested mapping describes.

    Args:
        adapter: pydantic's, for the object's type.
        tree: the values.
        where: what stands before the key in the message of an error, such as `mine.yaml: sweep.`.
        names: keys that the mapping may have, besides those beside a wrong one, to find the nearest.

    Raises:
        ConfigError: for the first mistake.
    """
    try:
        return adapter.validate_python(tree)
    except ValidationError as error:
        unknown = [each for each in error.errors() if each["type"] == "unexpected_keyword_argument"]
        problem = (unknown or error.errors())[0]  # a misspelt key tells more than the one that is missing instead
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "unexpected_keyword_argument":
        message += nearest(str(problem["loc"][-1]), [*names, *_beside(tree, problem["loc"])])
    elif problem["type"] not in ("missing", "value_error"):
        message += f", not {problem['input']!r}"
    key = ".".join(map(str, problem["loc"]))
    raise ConfigError(": ".join(filter(None, (f"{where}{key}".rstrip(".: "), message))))


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean top_k?` for `topk`; empty if no name is near."""
    near = difflib.get_close_matches(name, [other for other in names if other != name], n=1, cutoff=0.7)
    return f"; did you mean {near[0]}?" if near else ""


@contextmanager
def hydra_errors(file: str = "") -> Iterator[None]:
    """Turn errors of Hydra, OmegaConf and YAML about `file`, or about overrides, into `ConfigError`."""
    from hydra.errors import HydraException
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
    from yaml import YAMLError

    try:
        yield
    except Exception as error:
        # Hydra raises a ValueError for overrides such as ffn=null.
        group = type(error) is ValueError and str(error).startswith("Config group override")
        if not group and not isinstance(error, HydraException | OmegaConfBaseException | YAMLError):
            raise
        text, cause = str(error).partition("\nConfig search path")[0], error.__cause__
        if override := getattr(error, "override", None):
            if text.startswith("LexerNoViableAlt"):
                text = "not a key=value; one with blanks needs quotes of its own, as in OVERRIDES=\"'key=[1, 2]'\""
            text = text if override in text else f"override {override}: {text}"
        if isinstance(error, MissingMandatoryValue):
            text += "; a layer's file in conf/ffn sets it, and begins with the line `# @package _global_`"
        if isinstance(cause, OmegaConfBaseException) and cause.parent_node is not None:
            text = re.split(r"\.\s+To append to your config", text)[0]  # which would add a key that nothing reads
            text += _same_name(text, cause.parent_node) or nearest(str(cause.key), map(str, cause.parent_node))
        raise ConfigError(" ".join(f"{file}{': ' * bool(file)}{text}".split())) from None


def _same_name(text: str, node: Any) -> str:
    """`; did you mean optim.lr?` for a text that names `'lr'`: the shortest key of Hydra's whole tree that ends so."""
    from omegaconf import OmegaConf

    from peerscale.config.compose import leaves

    _, given, *_ = [*text.split("'"), ""]
    tree: Any = OmegaConf.to_container(node._get_root(), resolve=False)
    last = OTHER_NAMES.get(given) or given.rpartition(".")[2]
    same = [key for key, _ in leaves(tree, without=("hydra",)) if key.rpartition(".")[2] == last]
    return f"; did you mean {min(same, key=len)}?" if same else ""


def _beside(tree: Any, place: tuple[int | str, ...]) -> list[str]:
    """The keys beside the one at `place`."""
    for key in place[:-1]:
        tree = tree[key]
    return [str(key) for key in tree]
