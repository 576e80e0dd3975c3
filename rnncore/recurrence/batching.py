"""What vmap does to a call that has a batch of its own: mapped arrays become more of that batch."""

from __future__ import annotations

import jax.numpy as jnp

from rnncore._types import Array


def into_batch(size: int, axis: int, a: Array, is_mapped: bool) -> Array:
    """An array whose batch lies at `axis`, the `size` mapped ones (its first axis, or all alike) made part of that."""
    a = jnp.moveaxis(a, 0, axis) if is_mapped else jnp.repeat(jnp.expand_dims(a, axis), size, axis)
    return a.reshape(*a.shape[:axis], size * a.shape[axis + 1], *a.shape[axis + 2 :])


def out_of_batch(size: int, axis: int, a: Array) -> Array:
    """The inverse of a result: the mapped ones on its first axis."""
    apart = (*a.shape[:axis], size, a.shape[axis] // size, *a.shape[axis + 1 :])
    return jnp.moveaxis(a.reshape(apart), axis, 0)
