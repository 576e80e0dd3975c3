"""Stacks of rows along an axis, read and written in place; trees of them, None among the leaves."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from rnncore._types import Array, PyTree


def stretch(tree: PyTree, first: Any, size: int, axis: int) -> PyTree:
    """Rows first to first + size, brought to the front."""
    return jax.tree.map(lambda a: jnp.moveaxis(lax.dynamic_slice_in_dim(a, first, size, axis), axis, 0), tree)


def at(tree: PyTree, t: Any, axis: int) -> PyTree:
    """Row t."""
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, t, axis, keepdims=False), tree)


def put(tree: PyTree, rows: PyTree, t: Any, axis: int) -> PyTree:
    """The stacks with these rows as row t."""
    return jax.tree.map(lambda a, row: lax.dynamic_update_index_in_dim(a, row, t, axis), tree, rows)


def packed(a: Array, dtype: Any) -> Array:
    """The bits of the values in a dtype, as integers: on a CPU XLA converts whole stacks of bfloat16 to float32."""
    return lax.bitcast_convert_type(a.astype(dtype), f"uint{8 * jnp.dtype(dtype).itemsize}")


def unpacked(bits: Array, dtype: Any) -> Array:
    """The values that `packed` was given, in the dtype."""
    return lax.bitcast_convert_type(bits, dtype)


def blank(shapes: PyTree, like: Array, steps: int, axis: int) -> PyTree:
    """Stacks of zeros for rows of these shapes, on the devices of `like`, which is (*batch, H)."""

    def one(row: Any) -> Array:
        # Made from the data, so that inside shard_map and on explicit meshes they are sharded like it.
        zero = jnp.zeros_like(like[..., :1]).astype(row.dtype)
        batch, more = zero.ndim - 1, len(row.shape) - zero.ndim
        if more:
            zero = zero[..., 0] if more < 0 else jnp.expand_dims(zero, tuple(range(batch + 1, batch + 1 + more)))
        zero = jnp.broadcast_to(zero, (*zero.shape[:batch], *row.shape[batch:]))
        return jnp.repeat(jnp.expand_dims(zero, axis), steps, axis)

    return jax.tree.map(one, shapes)
