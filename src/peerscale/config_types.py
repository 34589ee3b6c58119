"""What the configuration's dataclasses have in common: the types of their fields, and how they are checked."""

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from peerscale.config_errors import ConfigError, one_line


def _no_bool(value: Any) -> Any:
    """Python's true is 1, but no number that anyone meant."""
    if isinstance(value, bool):
        raise ValueError(f"input should be a number, not {str(value).lower()}")
    return value


STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
Whole = Annotated[int, BeforeValidator(_no_bool), Field(ge=0)]
Seed = Annotated[int, BeforeValidator(_no_bool), Field(ge=0, lt=2**32)]
"""The seeds that numpy accepts."""
Positive = Annotated[int, BeforeValidator(_no_bool), Field(gt=0)]
Rate = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]

T = TypeVar("T")


def parse(adapter: TypeAdapter[T], root: type, tree: Mapping[str, Any], section: str = "") -> T:
    """A nested mapping, `section` of the file or all of it, as a `root`; raises `ConfigError` for its first mistake."""
    try:
        return adapter.validate_python(tree)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(one_line(first, root, section)) from None
