"""JSON that every reader takes: what Python's own writes as NaN or Infinity is null."""

import json
import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any


def dumps(value: Any, **options: Any) -> str:
    """``json.dumps`` of mappings, lists, texts and numbers, NumPy's too, of which none that is not finite."""
    return json.dumps(_strict(value), allow_nan=False, **options)


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _strict(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, Real) and not isinstance(value, bool):
        if isinstance(value, Integral):
            return int(value)
        return float(value) if math.isfinite(value) else None
    return value
