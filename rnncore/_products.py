"""Matrix products of stacks with a kernel, laid out so that their transposes need no copies."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from rnncore import _compat
from rnncore._types import Array


def times(x: Array, kernel: Array) -> Array:
    """x (..., D) times kernel (D, E)."""
    rows = _rows(x)
    return x @ kernel if rows is None else (rows @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


def times_transposed(x: Array, kernel: Array) -> Array:
    """x (..., D) times the transpose of kernel (E, D)."""
    rows = _rows(x)
    if rows is None:
        return jnp.einsum("...d,ed->...e", x, kernel)
    product = lax.dot_general(rows, kernel, (((1,), (1,)), ((), ())))
    return product.reshape(*x.shape[:-1], kernel.shape[0])


def _rows(x: Array) -> Array | None:
    """x with its leading axes merged, where that is free.

    The gradient of a kernel is then a product over one axis; over several XLA first copies the
    cotangents into another order.  Merging axes that are sharded would move data between devices,
    so it is done where there is one device, or inside shard_map, which sees one device's part.
    """
    alone = jax.device_count() == 1 and _compat.is_of_one_device(jax.typeof(x))
    if x.ndim <= 2 or not (alone or _compat.varying_axes(x)):
        return None
    return x.reshape(-1, x.shape[-1])
