"""The types of the fields of settings: numbers with their bounds, strictly checked."""

from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field


def _no_bool(value: Any) -> Any:
    """Refuse true and false, which Python counts as 1 and 0."""
    if isinstance(value, bool):
        raise ValueError(f"input should be a number, not {str(value).lower()}")
    return value


STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
Integer = Annotated[int, BeforeValidator(_no_bool)]
Number = Annotated[float, BeforeValidator(_no_bool)]
Whole = Annotated[Integer, Field(ge=0)]
Seed = Annotated[Integer, Field(ge=0, lt=2**32)]
"""The seeds that numpy accepts."""
Positive = Annotated[Integer, Field(gt=0)]
Rate = Annotated[Number, Field(gt=0)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
