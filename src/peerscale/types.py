"""The types of the fields of settings: names, and numbers with their bounds, strictly checked."""

from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter


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
_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
FileName = Annotated[str, Field(pattern=f"^{_NAME}$")]
"""A name of which a file's name is made: of a sweep, a corpus, a held-out set."""
FileNameOrEmpty = Annotated[str, Field(pattern=f"^({_NAME})?$")]
"""The same for what not every layer has, its variant."""
FILE_NAME: TypeAdapter[str] = TypeAdapter(FileName)
Positive = Annotated[Integer, Field(gt=0)]
Size = Annotated[Positive, Field(le=2**20)]
"""A count of which a list may be made, such as that of blocks."""
Rate = Annotated[Number, Field(gt=0)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
