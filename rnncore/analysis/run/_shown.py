"""The `__repr__` of results: arrays by dtype and shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax


def shown(result: Any) -> str:
    """A named tuple or dataclass in one line, such as NormEstimate(log_norm=float32[2], error=float32[2])."""
    names = getattr(result, "_fields", None) or [field.name for field in dataclasses.fields(result)]
    return f"{type(result).__name__}({', '.join(f'{name}={_part(getattr(result, name))}' for name in names)})"


def _part(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name!r}: {_part(one)}' for name, one in value.items())}}}"
    if hasattr(value, "_fields"):
        return shown(value)
    if hasattr(value, "shape") and (value.shape or isinstance(value, jax.core.Tracer)):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    return f"{float(value):.4g}" if isinstance(value, float) or hasattr(value, "shape") else repr(value)
