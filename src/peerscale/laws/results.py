"""The plain things that laws share: arrays, a fit's status, the JSON form of results."""

import dataclasses
import math
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import numpy as np

Array = np.ndarray
Number = float | np.ndarray
"""A coefficient or prediction, or an array of bootstrap draws of it."""


class FitStatus(StrEnum):
    """What a fit's coefficients can be used for; decided from the fit itself, never from an optimiser's flag."""

    CONVERGED = "converged"
    """The best optimum of several starts, inside the bounds, every coefficient determined by the data."""
    AT_BOUND = "at_bound"
    """A coefficient ended on the edge of its range, such as an irreducible loss of zero."""
    NOT_IDENTIFIABLE = "not_identifiable"
    """A coefficient is uncertain by more than its own size: publish predictions, not coefficients."""
    TOO_FEW_POINTS = "too_few_points"
    """No more points than coefficients (isoFLOP: fewer than three usable budgets)."""


def to_plain(value: Any) -> Any:
    """Dicts, lists, strings and finite numbers (None where not finite), ready for JSON."""
    match value:
        case StrEnum():
            return str(value)
        case float() | np.floating():
            return float(value) if math.isfinite(value) else None
        case np.integer() | np.bool_():
            return value.item()
        case Mapping():
            return {str(key): to_plain(item) for key, item in value.items()}
        case list() | tuple() | np.ndarray():
            return [to_plain(item) for item in value]
    if hasattr(value, "to_dict"):
        return value.to_dict()
    return fields_to_plain(value) if dataclasses.is_dataclass(value) else value


def fields_to_plain(result: Any) -> dict[str, Any]:
    """The fields of a dataclass by name, each as `to_plain` gives it."""
    return {field.name: to_plain(getattr(result, field.name)) for field in dataclasses.fields(result)}
