"""An nnx cell of any kind under nnx.scan: Flax's own way, with lengths done right."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rnncore import _lengths, pointwise
from rnncore._types import Array, PyTree
from rnncore.sequence import States


def scan_cell(
    rnn: Any, inputs: Array, carry: Any, time_axis: int, *, seq_lengths: Any, resets: Any, reverse: bool,
    keep_order: bool, return_carry: bool, return_states: bool,
) -> tuple[Any, ...]:  # fmt: skip
    """(carry, outputs[, States]) of an RNN module whose cell need not be ours; see `RNN.__call__`."""
    features = rnn.cell.num_feature_axes
    xs = jnp.moveaxis(inputs, time_axis, 0)
    steps, batch_shape = xs.shape[0], xs.shape[1 : xs.ndim - features]
    lengths = None if seq_lengths is None else _lengths.check_lengths(seq_lengths, batch_shape, steps)
    if lengths is not None:
        flat = xs.reshape(*xs.shape[: xs.ndim - features], math.prod(xs.shape[xs.ndim - features :]))
        xs = _lengths.blank_padding(flat, lengths).reshape(xs.shape)
    if resets is not None:
        resets = jnp.asarray(resets)
        expected = (*batch_shape[:time_axis], steps, *batch_shape[time_axis:])
        if resets.dtype != jnp.bool_ or resets.shape != expected:
            raise ValueError(f"`RNN(cell)(resets=<{resets.dtype} {resets.shape}>)`: expected bool {expected}.")
        resets = jnp.moveaxis(resets, time_axis, 0)
    if reverse:
        xs, resets = _lengths.reverse_time((xs, resets), lengths)
    # The last valid carry travels along, so that no history of carries is stacked for it.
    last = carry if lengths is not None and return_carry else None
    if last is not None or resets is not None:
        _check_batch(rnn.cell, carry, batch_shape)

    def step(cell: Any, state: Any, now: Any) -> Any:
        (before, last), (x, reset, t) = state, now
        if reset is not None:
            before = jax.tree.map(lambda a, b: jnp.where(_expand(reset, a), a, b), carry, before)
        new, y = cell(before, x)
        new = _in_dtypes_of(before, new)
        if last is not None:
            assert lengths is not None
            last = _lengths.last_valid(last, jax.tree.map(lambda a: a[None], new), lengths, t)
        return (new, last), (y, new if return_states else None)

    axes = nnx.StateAxes({nnx.All(nnx.RngState, rnn.broadcast_rngs): None, **rnn.state_axes})
    scan = nnx.compat.scan(step, in_axes=(axes, nnx.Carry, 0), out_axes=(nnx.Carry, 0), unroll=rnn.unroll)
    # One split squeezed away: a broadcast stream is advanced once in every call.
    scan = nnx.split_rngs(splits=1, only=rnn.broadcast_rngs, squeeze=True)(scan)
    (end, last), ys = scan(rnn.cell, (carry, last), (xs, resets, jnp.arange(steps)))
    if reverse and keep_order:
        ys = _lengths.reverse_time(ys, lengths)
    outputs, carries = jax.tree.map(lambda a: jnp.moveaxis(a, 0, time_axis), ys)
    states = (States(carries, None),) if return_states else ()
    return (end if last is None else last, outputs, *states)


def _expand(mask: Array, like: Array) -> Array:
    return mask.reshape(mask.shape + (1,) * (like.ndim - mask.ndim))


def _in_dtypes_of(before: PyTree, new: PyTree) -> PyTree:
    """The new carry in the dtypes of the old one, where both are floating; other faults are for nnx.scan to tell."""
    if not pointwise.same_structure(before, new):
        return new

    def cast(b: Any, n: Any) -> Any:
        both = jnp.issubdtype(b.dtype, jnp.floating) and jnp.issubdtype(n.dtype, jnp.floating)
        return n.astype(b.dtype) if both else n

    return jax.tree.map(cast, before, new)


def _check_batch(cell: Any, carry: Any, batch_shape: tuple[int, ...]) -> None:
    for leaf in jax.tree.leaves(carry):
        if jnp.shape(leaf)[: len(batch_shape)] != batch_shape:
            raise ValueError(
                f"`RNN({type(cell).__name__}(...))(seq_lengths or resets)`: the cell's carry has an array of shape "
                f"{jnp.shape(leaf)}, expected the batch axes {batch_shape} in front."
            )
