"""Calls that XLA makes of libraries: their names, and the arrays that they take and give."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from rnncore import _compat
from rnncore._types import Array

_registered: set[str] = set()


def register(name: str, library: ctypes.CDLL, function: str, platform: str) -> str:
    """The name, under which XLA finds a function of a library from now on; a process registers a name once."""
    if name not in _registered:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, function)), platform=platform)
        _registered.add(name)
    return name


def call(
    target: str, results: Sequence[tuple[tuple[int, ...], Any]], arrays: Sequence[Array],
    aliases: Mapping[int, int] | None = None, /, **attributes: Any,
) -> tuple[Array, ...]:  # fmt: skip
    """Calls a registered function.

    Args:
      target: the name under which it was registered.
      results: (shape, dtype) of each.
      arrays: inside shard_map they and the results differ over all the devices over which any of them does.
      aliases: the inputs in whose memory results are, input to result.
      attributes: NumPy numbers and arrays, booleans and strings.
    """
    axes = frozenset().union(*map(_compat.varying_axes, arrays))
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in results]
    made = jax.ffi.ffi_call(target, shapes, input_output_aliases=None if aliases is None else dict(aliases))
    found = made(*(_compat.vary_over(a, axes) for a in arrays), **attributes)
    return tuple(_compat.vary_over(a, axes) for a in found)
