"""Letters and aliases that every file of rnncore uses.

T time steps, B batch (any number of axes, none too), D input features, H hidden units,
G gates, N heads.  A slab is an array whose last axis holds the G gates side by side, G*H long.
In Jacobians rows are outputs and columns are inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.export

Array = jax.Array
PyTree = Any
Initializer = Callable[..., Any]
"""An initialiser as jax.nn.initializers makes them: (key, shape, dtype) -> Array."""
Activation = Callable[[Any], Any]

T = TypeVar("T", bound=type)


def exportable(cls: T, name: str | None = None) -> T:
    """A class of named tuples that `jax.export` can write down, by a name within this package."""
    jax.export.register_namedtuple_serialization(cls, serialized_name=f"rnncore.{name or cls.__name__}")
    return cls
