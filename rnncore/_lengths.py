"""Sequence lengths: checks, masks, the length-aware reverse and the last valid carry.

Everything here is time-major: sequences are (T, *batch, ...), lengths are (*batch).  A length L
means that steps 0 .. L-1 are data and the rest is padding; L = 0 is an empty sequence.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rnncore._types import Array, PyTree


def check_lengths(seq_lengths: Any, batch_shape: tuple[int, ...], steps: int) -> Array:
    """The lengths as int32 within 0 to T, or ValueError.

    Values that are known, also as constants inside jit, are checked; those that are not are clipped.
    """
    lengths = seq_lengths if isinstance(seq_lengths, jax.Array) else np.asarray(seq_lengths)
    got = f"`unroll(seq_lengths=<{lengths.dtype} {lengths.shape}>)`"
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(f"{got}: expected integers, the number of valid steps of each sequence.")
    if lengths.shape != batch_shape:
        raise ValueError(f"{got}: expected the batch shape {batch_shape}; broadcast the lengths if all are equal.")
    if not isinstance(lengths, jax.core.Tracer) and lengths.size:
        values = np.asarray(lengths)  # inside jit jnp.min would be traced even of a constant
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > steps:
            raise ValueError(f"{got}: values from {low} to {high}; expected 0 to T = {steps}.")
    # Wide first: T may not fit the lengths' own dtype, nor length - 1 in an unsigned one.
    wide = lengths.astype(np.int32) if lengths.dtype.itemsize < 4 else lengths
    return jnp.clip(wide, 0, steps).astype(jnp.int32)


def valid_mask(lengths: Array, steps: int, start: Array | int = 0) -> Array:
    """(steps, *batch) booleans: whether step start + t lies inside the length."""
    times = jnp.arange(steps, dtype=lengths.dtype).reshape((steps,) + (1,) * lengths.ndim)
    return times + start < lengths[None]


def blank_padding(xs: Array, lengths: Array, axis: int = 0) -> Array:
    """NaN and inf in the padding become 0, finite padding stays as it is; time along `axis`."""
    inside = jnp.moveaxis(valid_mask(lengths, xs.shape[axis])[..., None], 0, axis)
    return jnp.where(inside | jnp.isfinite(xs), xs, jnp.zeros_like(xs))


def reverse_time(tree: PyTree, lengths: Array | None) -> PyTree:
    """Time reversed; with lengths the valid prefix is reversed and padding stays at the end.

    The padding is reversed in place too, as Flax does; doing this twice is the identity.
    """
    if lengths is None:
        return jax.tree.map(lambda a: jnp.flip(a, 0), tree)

    def flip(a: Array) -> Array:
        steps = a.shape[0]
        times = jnp.arange(steps, dtype=lengths.dtype).reshape((steps,) + (1,) * lengths.ndim)
        # Steps 0..L-1 read L-1..0, steps L..T-1 read T-1..L.
        ends = lengths[None]
        source = jnp.where(times < ends, ends - 1 - times, steps - 1 - times + ends)
        source = source.reshape(source.shape + (1,) * (a.ndim - source.ndim))
        return jnp.take_along_axis(a, source, axis=0)

    return jax.tree.map(flip, tree)


def last_valid(carry: PyTree, carries: PyTree, lengths: Array, start: Array | int) -> PyTree:
    """The carry after the last valid step, given the carries after steps start, start+1, ...

    Args:
      carry: what is returned where no step of this stretch is the last valid one.
      carries: (K, *batch, ...) stacked carries of the stretch.
      lengths: (*batch) lengths of the whole sequences.
      start: index of the stretch's first step.
    """

    def select(before: Array, stack: Array) -> Array:
        steps = stack.shape[0]
        times = jnp.arange(steps, dtype=lengths.dtype).reshape((steps,) + (1,) * lengths.ndim) + start
        hit = times == lengths[None] - 1
        hit = hit.reshape(hit.shape + (1,) * (stack.ndim - hit.ndim))
        # A masked sum, not a gather: it never multiplies by a padded value and shards over the batch.
        found = jnp.sum(jnp.where(hit, stack, jnp.zeros_like(stack)), axis=0, dtype=stack.dtype)
        return jnp.where(jnp.any(hit, axis=0), found, before)

    return jax.tree.map(select, carry, carries)
