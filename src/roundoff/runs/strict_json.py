"""JSON that every reader accepts: a number that is not finite is written as null, since JSON has no such number."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def dumps(value: Any, *, indent: int | None = None) -> str:
    """The value as JSON, with null for NaN and infinities.

    Python's own `json.dumps` writes `NaN`, which is not JSON: other programs refuse the whole file.
    """
    return json.dumps(finite_or_null(value), indent=indent, allow_nan=False)


def finite_or_null(value: Any) -> Any:
    """The same data, with None for every float that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite_or_null(item) for key, item in value.items()}
    return [finite_or_null(item) for item in value] if isinstance(value, list | tuple) else value
