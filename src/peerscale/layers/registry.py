"""From a mapping of settings to a layer: a built-in one by its `method`, any other by the import path in `class`."""

import ast
import contextlib
import functools
import hashlib
import pkgutil
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, TypeAdapter

from peerscale.errors import ConfigError
from peerscale.layers.base import FfnConfig

BUILT_IN = {
    "dense": "peerscale.layers.dense.DenseConfig",
    "wide_dense": "peerscale.layers.dense.WideDenseConfig",
    "no_layer": "peerscale.layers.dense.NoLayerConfig",
    "wasted": "peerscale.layers.dense.WastedConfig",
    "relu_squared": "peerscale.layers.relu_squared.ReluSquaredConfig",
    "swiglu": "peerscale.layers.swiglu.SwigluConfig",
    "moe": "peerscale.layers.moe.MoeConfig",
    "fine_grained_moe": "peerscale.layers.fine_grained_moe.FineGrainedMoeConfig",
    "balanced_moe": "peerscale.layers.balanced_moe.BalancedMoeConfig",
    "pkm": "peerscale.layers.pkm.PkmConfig",
    "memory_plus": "peerscale.layers.memory_plus.MemoryPlusConfig",
    "peer": "peerscale.layers.peer.PeerConfig",
    "engram": "peerscale.layers.engram.EngramConfig",
}
"""The built-in layers, which need no `class`, by `method`."""


def parse_layer(value: Any) -> FfnConfig:
    """The layer that a mapping describes; pydantic calls this for every field that holds a layer.

    Raises:
        ConfigError: there is no such layer, or its class cannot be used.
        ValidationError: its settings are wrong.
    """
    if isinstance(value, FfnConfig):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(f"input should be a mapping, not {value!r}")
    settings = {key: setting for key, setting in value.items() if key not in ("class", "source_sha256")}
    kind = layer_class(value)
    layer = _adapter(kind).validate_python(settings)
    if layer.method != (method := _method_of(kind)):
        raise ConfigError(f"method {layer.method!r} is not that of {kind.__name__}, which is {method!r}")
    return layer


def layer_class(value: Mapping[str, Any]) -> type[FfnConfig]:
    """The class of the layer that a mapping describes; its settings are not checked. Raises `ConfigError`."""
    if path := value.get("class"):
        return _outside(str(path))
    if not isinstance(method := value.get("method"), str) or method not in BUILT_IN:
        raise ConfigError(
            f"method {method!r} is not a layer of peerscale, which are {', '.join(BUILT_IN)}; "
            "for one of your own give its class, such as class: mylab.gated.GatedConfig"
        )
    return pkgutil.resolve_name(BUILT_IN[method])


def _method_of(kind: type[FfnConfig]) -> Any:
    """The `method` of all layers of a class."""
    return next(field.default for field in fields(kind) if field.name == "method")


def dump_layer(layer: FfnConfig) -> dict[str, Any]:
    """Plain values; the inverse of `parse_layer`.

    For a layer outside peerscale they include its `class` and a hash of the module that defines it, `source_sha256`.
    Both enter the cell's fingerprint, so a module with other code counts as another layer.
    """
    settings = _adapter(type(layer)).dump_python(layer, mode="json")
    path = f"{type(layer).__module__}.{type(layer).__qualname__}"
    if BUILT_IN.get(layer.method) == path:
        return settings
    return {"class": path, "source_sha256": _source_sha256(type(layer).__module__), **settings}


def code_changed(dumped: Mapping[str, Any]) -> bool:
    """Whether the module of a layer that `dump_layer` described has other code now; False if it is not found."""
    if "source_sha256" not in dumped:
        return False
    with contextlib.suppress(ConfigError):
        return dumped["source_sha256"] != _source_sha256(layer_class(dumped).__module__)
    return False


Layer = Annotated[FfnConfig, BeforeValidator(parse_layer), PlainSerializer(dump_layer, return_type=dict[str, Any])]
"""The type of a field that holds any layer."""


@functools.cache
def _adapter(kind: type[FfnConfig]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _outside(path: str) -> type[FfnConfig]:
    """The class of a layer outside peerscale; its module may lie in the current folder."""
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        kind = pkgutil.resolve_name(path)
    except Exception as error:  # its module can raise any
        why = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ConfigError(f"class {path} is not found in the current folder or on PYTHONPATH: {why}") from None
    if not (isinstance(kind, type) and issubclass(kind, FfnConfig)) or "__dataclass_fields__" not in vars(kind):
        raise ConfigError(
            f"class {path} is not a subclass of peerscale.layers.FfnConfig with the decorator layer_config"
        )
    if kind.cost is FfnConfig.cost or kind.build is FfnConfig.build:
        raise ConfigError(f"class {path} needs the methods cost(self, around) and build(self, around)")
    if not isinstance(method := _method_of(kind), str) or method in BUILT_IN:
        raise ConfigError(f"class {path} needs a default for method, and none of {', '.join(BUILT_IN)}")
    return kind


@functools.cache
def _source_sha256(module: str) -> str:
    """The SHA-256 of a module's syntax tree, written as code: comments, docstrings and layout are not in it."""
    file = getattr(sys.modules[module], "__file__", None)
    if file is None:
        raise ConfigError(f"the layer of {module} is not in a file; training needs its class in a module's file")
    tree = _WithoutTexts().visit(ast.parse(Path(file).read_bytes()))
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()


class _WithoutTexts(ast.NodeTransformer):
    """Removes statements that are only a text, such as docstrings."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_text else node
