"""What vmap does to an opaque call that has a batch of its own: mapped sequences become more of that batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from rnncore import _compat
from rnncore._types import Array, PyTree

Axes = Sequence[int | None] | Callable[[Array], int | None]


def over_batch(call: Callable[..., PyTree], inputs: Axes, outputs: Axes) -> Callable[..., PyTree]:
    """`call(groups, *arrays)`, which gives a pytree of arrays, as a function of arrays that vmap takes into the batch.

    Sequences lie in `groups` of equal size, one group after the other; outside of vmap there is one.  A vmap over an
    array that all sequences share, such as a parameter, runs one call after the other.

    Args:
      call: the opaque call, such as an FFI call or a kernel.
      inputs: for each array the axis of its batch, or a function of the array that says it; None where the sequences
        share the array.  An array of shape (0,) stands for none.
      outputs: the same for each leaf of the result; None for a sum over the sequences of each group, which then has the
        groups as its first axis, also where there is one.  Only a call with such results need look at `groups`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rnncore.recurrence.batching import over_batch
      >>> products = over_batch(lambda groups, x, w: x @ w, (0, None), (0,))  # x (B, D), w (D, E)
      >>> jax.vmap(products, (0, None))(jnp.ones((3, 2, 4)), jnp.ones((4, 5))).shape
      (3, 2, 5)
    """
    return _over_batch(call, inputs, outputs, 1)


def _over_batch(call: Callable[..., PyTree], inputs: Axes, outputs: Axes, groups: int) -> Callable[..., PyTree]:
    @custom_vmap
    def run(*arrays: Array) -> PyTree:
        out = call(groups, *arrays)
        # Not every call says itself that inside shard_map its results differ over the devices.
        axes = frozenset().union(*map(_compat.varying_axes, arrays))
        return jax.tree.map(lambda a: _compat.vary_over(a, axes), out)

    def rule(size: int, mapped: Sequence[bool], *arrays: Array) -> tuple[PyTree, PyTree]:
        if size == 0:
            one = [jax.ShapeDtypeStruct(a.shape[m:], a.dtype) for a, m in zip(arrays, mapped, strict=True)]
            out = jax.tree.map(lambda a: jnp.zeros((0, *a.shape), a.dtype), jax.eval_shape(run, *one))
            return out, jax.tree.map(lambda _: True, out)
        # Of a mapped array the axes of one example count.
        examples = [jax.ShapeDtypeStruct(a.shape[m:], a.dtype) for a, m in zip(arrays, mapped, strict=True)]
        axes = _axes(inputs, examples)
        if any(m and axis is None and a.shape != (0,) for m, axis, a in zip(mapped, axes, examples, strict=True)):

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

        together = map(merged, arrays, mapped, axes, examples)
        out = _over_batch(call, inputs, outputs, groups * size)(*together)
        tree: Any
        leaves, tree = jax.tree.flatten(out)

        def parted(a: Array, axis: int | None) -> Array:
            # Of sums over groups, the groups of the maps are the outer ones.
            axis = axis or 0
            if a.shape == (0,):
                return a
            apart = (*a.shape[:axis], size, a.shape[axis] // size, *a.shape[axis + 1 :])
            return jnp.moveaxis(a.reshape(apart), axis, 0)

        apart = [parted(a, axis) for a, axis in zip(leaves, _axes(outputs, leaves), strict=True)]
        return tree.unflatten(apart), tree.unflatten([a.shape != (0,) for a in leaves])

    run.def_vmap(rule)
    return run


def _axes(axes: Axes, arrays: Sequence[Any]) -> Sequence[int | None]:
    return [axes(a) for a in arrays] if callable(axes) else axes
