"""JSON that any browser reads, compressed."""

from __future__ import annotations

import base64
import gzip
import json
import math
from typing import Any


def as_json(value: Any, ensure_ascii: bool = False) -> str:
    """Compact JSON. What JSON has no number for stands as its name: "NaN", "Infinity" or "-Infinity"."""
    try:
        return json.dumps(value, ensure_ascii=ensure_ascii, separators=(",", ":"), allow_nan=False)
    except ValueError:
        return json.dumps(_named(value), ensure_ascii=ensure_ascii, separators=(",", ":"), allow_nan=False)


def _named(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _named(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_named(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def compress(text: str) -> str:
    """gzip, base64."""
    return base64.b64encode(gzip.compress(text.encode("utf-8", "replace"), 6, mtime=0)).decode("ascii")


def pack(value: Any) -> str:
    """A value as the page unpacks it."""
    return compress(as_json(value))
