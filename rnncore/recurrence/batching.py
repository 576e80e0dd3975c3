"""vmap of a run and of an opaque call: mapped sequences are added to the batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from rnncore import _compat
from rnncore._types import Array, PyTree
from rnncore.recurrence.loop import Loop, at_leaves
from rnncore.recurrence.run import operand_axes, result_axes


class Units(NamedTuple):
    """How cells of other parameters become more heads of one: what vmap over parameters can give a call.

    Fields:
      hidden: H, the units of the cell.
      inputs: for each array HEADS where its first axis is that of the heads, LAST where its last one is that of the
        units (H, or a multiple of it), None where it has neither.  All results are of LAST.
      worthwhile: (size, arrays of all heads, arrays of one cell) -> whether one call is better than `size` calls.
    """

    hidden: int
    inputs: Sequence[int | None]
    worthwhile: Callable[[int, Sequence[Any], Sequence[Any]], bool]

    def merged(self, a: Array, is_mapped: bool, size: int, axis: int) -> Array:
        """Of `size` cells one array, of whose `axis` theirs are parts."""
        a = a if is_mapped else jnp.broadcast_to(a, (size, *a.shape))
        if axis == HEADS:
            return a.reshape(-1, *a.shape[2:])
        apart = a.reshape(*a.shape[:-1], a.shape[-1] // self.hidden, self.hidden)
        return jnp.moveaxis(apart, 0, -2).reshape(*a.shape[1:-1], size * a.shape[-1])

    def parted(self, a: Array, size: int) -> Array:
        """The inverse, for a result."""
        apart = a.reshape(*a.shape[:-1], a.shape[-1] // (size * self.hidden), size, self.hidden)
        return jnp.moveaxis(apart, -2, 0).reshape(size, *a.shape[:-1], a.shape[-1] // size)


HEADS, LAST = 0, -1
Axes = Sequence[int | None] | Callable[[Array], int | None]


def over_batch(
    call: Callable[..., PyTree], inputs: Sequence[int | None], outputs: Axes, units: Units | None = None
) -> Callable[..., PyTree]:
    """`call(groups, *arrays)`, which returns a pytree of arrays, as a function whose vmap extends the batch.

    Sequences lie in `groups` of equal size, one group after the other; outside of vmap there is one.  A vmap over an
    array that all sequences share, such as a parameter, runs one call after the other, or one of more heads.

    Args:
      call: the opaque call, such as an FFI call or a kernel.
      inputs: for each array the axis of its batch; None where the sequences share the array.  An array of shape (0,)
        stands for none.
      outputs: the same for each leaf of the result, or a function of the leaf that says it; None for a sum over the
        sequences of each group, which then has the groups as its first axis, also where there is one.  Only a call with
        such results need look at `groups`.
      units: for a call that takes arrays of more heads as they are; None for others.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rnncore.recurrence.batching import over_batch
      >>> products = over_batch(lambda groups, x, w: x @ w, (0, None), (0,))  # x (B, D), w (D, E)
      >>> jax.vmap(products, (0, None))(jnp.ones((3, 2, 4)), jnp.ones((4, 5))).shape
      (3, 2, 5)
    """
    return _over_batch(call, inputs, outputs, 1, units)


def _over_batch(
    call: Callable[..., PyTree], inputs: Sequence[int | None], outputs: Axes, groups: int, units: Units | None
) -> Callable[..., PyTree]:
    @custom_vmap
    def run(*arrays: Array) -> PyTree:
        out = call(groups, *arrays)
        # Not every call declares that its results vary over the devices inside shard_map.
        axes = frozenset().union(*map(_compat.varying_axes, arrays))
        return jax.tree.map(lambda a: _compat.vary_over(a, axes), out)

    def rule(size: int, mapped: Sequence[bool], *arrays: Array) -> tuple[PyTree, PyTree]:
        # For a mapped array, count the axes of one example.
        examples = [jax.ShapeDtypeStruct(a.shape[m:], a.dtype) for a, m in zip(arrays, mapped, strict=True)]
        if size == 0:
            out = jax.tree.map(lambda a: jnp.zeros((0, *a.shape), a.dtype), jax.eval_shape(run, *examples))
            return out, jax.tree.map(lambda _: True, out)
        if any(m and axis is None and a.shape != (0,) for m, axis, a in zip(mapped, inputs, examples, strict=True)):
            if units is not None and all(axis is not None for axis, m in zip(units.inputs, mapped, strict=True) if m):
                together = [
                    a if axis is None else units.merged(a, m, size, axis)
                    for a, m, axis in zip(arrays, mapped, units.inputs, strict=True)
                ]
                if units.worthwhile(size, together, examples):
                    wider = units._replace(hidden=size * units.hidden)
                    out = _over_batch(call, inputs, outputs, groups, wider)(*together)
                    return jax.tree.map(lambda a: units.parted(a, size), out), jax.tree.map(lambda _: True, out)

            def of_mapped(some: list[Array]) -> PyTree:
                rest = iter(some)
                return run(*(next(rest) if m else a for a, m in zip(arrays, mapped, strict=True)))

            out = jax.lax.map(of_mapped, [a for a, m in zip(arrays, mapped, strict=True) if m])
            return out, jax.tree.map(lambda _: True, out)

        def merged(a: Array, is_mapped: bool, axis: int | None, example: Any) -> Array:
            if example.shape == (0,):
                return a[0] if is_mapped else a
            if axis is None:
                return a
            a = jnp.moveaxis(a, 0, axis) if is_mapped else jnp.repeat(jnp.expand_dims(a, axis), size, axis)
            return a.reshape(*a.shape[:axis], size * a.shape[axis + 1], *a.shape[axis + 2 :])

        more = map(merged, arrays, mapped, inputs, examples)
        out = _over_batch(call, inputs, outputs, groups * size, units)(*more)
        tree: Any
        leaves, tree = jax.tree.flatten(out)

        def parted(a: Array, axis: int | None) -> Array:
            # Of sums over groups, the groups of the maps are the outer ones.
            axis = axis or 0
            if a.shape == (0,):
                return a
            apart = (*a.shape[:axis], size, a.shape[axis] // size, *a.shape[axis + 1 :])
            return jnp.moveaxis(a.reshape(apart), axis, 0)

        axes = map(outputs, leaves) if callable(outputs) else outputs
        apart = [parted(a, axis) for a, axis in zip(leaves, axes, strict=True)]
        return tree.unflatten(apart), tree.unflatten([a.shape != (0,) for a in leaves])

    run.def_vmap(rule)
    return run


# -------------------------------------------------------------------------------------- a run
#
# vmap over sequences makes them more of the batch, as the outermost of its axes.  The gradients of parameters are then
# sums over all sequences at once, where vmap of the loop would form them one by one to add them up.  `roles` are the
# axes at which the batch begins in each operand, None where the sequences share it, and the same of each result, or
# None in their place where vmap of the loop is called for.


def _axes_of_run(loop: Loop, ndims: Sequence[int]) -> tuple[list[int | None], list[int], list[int]]:
    """Where the batch begins in (differentiable, constants), in the result, and in the residuals."""
    count, residuals = loop.differentiable.num_leaves, 0 if loop.residuals is None else loop.residuals.num_leaves
    constants = jax.tree.unflatten(loop.constants, ndims[count : count + loop.constants.num_leaves])
    operands = operand_axes(loop.request, at_leaves(loop.differentiable, (), (), 0), constants)
    results = result_axes(loop.request, at_leaves(loop.result, (), (), 0))
    shared = [None if axis < 0 else axis for axis in jax.tree.leaves(operands)]
    return shared, jax.tree.leaves(results), [1] * residuals


def run_roles(loop: Loop, which: tuple, ndims: Sequence[int]) -> Any:
    operands, results, residuals = _axes_of_run(loop, ndims)
    return operands, results + residuals


def tangent_roles(loop: Loop, which: tuple[int, ...], ndims: Sequence[int]) -> Any:
    operands, results, residuals = _axes_of_run(loop, ndims)
    moved = [operands[n] for n in which]
    return operands + results + residuals + moved, [results[n] for n in loop.inexact]


def backward_roles(loop: Loop, which: tuple[tuple[int, ...], tuple[int, ...]], ndims: Sequence[int]) -> Any:
    operands, results, residuals = _axes_of_run(loop, ndims)
    arriving, wanted = ([results[n] for n in which[0]], [operands[n] for n in which[1]])
    # Each map needs its own gradient of the parameters, so a sum over all maps is no use.
    return operands + results + residuals + arriving, None if None in wanted else wanted


def only_sequences(axes: Sequence[int | None], dims: Sequence[int | None], loop: Loop) -> bool:
    """Whether a map is over sequences: not over tangents alone, to which the run they belong to is common."""
    held = loop.count if loop.residuals is not None else len(dims)
    of_run = any(d is not None for d in dims[:held])
    return of_run and all(axis is not None or d is None for axis, d in zip(axes, dims, strict=True))


def _size(flat: Sequence[Any], dims: Sequence[int | None]) -> int:
    return next(a.shape[d] for a, d in zip(flat, dims, strict=True) if d is not None)


def into_batch(flat: Sequence[Any], dims: Sequence[int | None]) -> Callable[..., Array]:
    size = _size(flat, dims)

    def merged(a: Array, dim: int | None, axis: int | None) -> Array:
        if axis is None:
            return a
        return jnp.repeat(jnp.expand_dims(a, axis), size, axis) if dim is None else jnp.moveaxis(a, dim, axis)

    return merged


def with_batch(loop: Loop, flat: Sequence[Any], dims: Sequence[int | None]) -> Loop:
    request = loop.request
    batch_shape = (_size(flat, dims), *request.batch_shape)
    time_axis = request.time_axis + 1 if request.time_axis else 0
    larger = dataclasses.replace(request, batch_shape=batch_shape, time_axis=time_axis)
    return dataclasses.replace(loop, request=larger)
