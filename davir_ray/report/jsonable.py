"""Any value as plain JSON, and nested settings as flat names."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

LARGEST_EXACT_INT = 2**53  # above this, JavaScript and many JSON readers round


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Nested mappings as (dotted name, value) pairs; lists of mappings by index."""
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{name}.")
        elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
            yield from flatten(dict(enumerate(value)), f"{name}.")  # type: ignore[arg-type]
        else:
            yield name, value


def json_ready(value: Any) -> Any:
    """Plain JSON types: not-finite numbers become None, whole numbers above 2**53 and unknown types strings."""
    match value:
        case None | bool():
            return value
        case np.generic() | np.ndarray():
            return json_ready(value.tolist())
        case str():
            return value.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate cannot be written
        case int():
            return value if abs(value) <= LARGEST_EXACT_INT else str(value)
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {str(json_ready(key)): json_ready(item) for key, item in value.items()}
        case list() | tuple():
            return [json_ready(item) for item in value]
        case _:
            return json_ready(str(value))
