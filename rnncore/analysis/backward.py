"""One run of a cell and one backward pass through it that leaves the gradient at every state.

Zeros are added to every state, and the loss is differentiated in terms of them.  They enter as further
features of the inputs, so `unroll` itself runs and differentiates: its lengths, resets and carries hold
here as they do there.  What else one may ask about a step (its gates, its share of a parameter's
gradient) is local: it follows from the gradient at the state after the step, all steps at once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rnncore import _lengths
from rnncore._types import Array, PyTree
from rnncore.analysis.trajectory import check_finite
from rnncore.cells.base import Cell, PointwiseCell
from rnncore.sequence.call import explain_backend, unroll


class Backward(NamedTuple):
    """What one backward pass leaves behind, batch-major.

    Fields:
      value: the loss.
      states: dL/ds_t, a carry of arrays (*batch, T + 1, ...).
      inputs: dL/dx_t, (*batch, T, D).
      before: the carry that each step starts from, resets done, (*batch, T, ...).
      xs: the inputs as they ran, (*batch, T, D).
      zs: the projected inputs, (*batch, T, ...).
    """

    value: Array
    states: Any
    inputs: Array
    before: Any
    xs: Array
    zs: PyTree

    @property
    def after(self) -> Any:
        """dL/ds_t for t = 1 .. T."""
        axis = self.xs.ndim - 2
        return jax.tree.map(lambda a: jax.lax.slice_in_dim(a, 1, None, axis=axis), self.states)


@dataclasses.dataclass(frozen=True)
class Moved(Cell):
    """A cell whose inputs hold n more features, which are added to its state after the step."""

    cell: Cell

    def init(self, key: Array, input_size: int, dtype: Any = jnp.float32) -> PyTree:
        return self.cell.init(key, input_size - sum(map(math.prod, self.shapes)), dtype)

    def initial_carry(self, batch_shape: Sequence[int] = (), dtype: Any = jnp.float32) -> Any:
        return self.cell.initial_carry(batch_shape, dtype)

    def project(self, params: PyTree, xs: Array) -> PyTree:
        size = xs.shape[-1] - sum(map(math.prod, self.shapes))
        return self.cell.project(params, xs[..., :size]), xs[..., :size], xs[..., size:]

    def update(self, params: PyTree, carry: Any, z: PyTree) -> tuple[Any, PyTree]:
        z, x, flat = z
        new, _ = self.cell.update(params, carry, z)
        leaves, tree = jax.tree.flatten(new)
        pieces = jax.lax.split(flat, [math.prod(shape) for shape in self.shapes], flat.ndim - 1)
        leaves = [a + move.reshape(a.shape).astype(a.dtype) for a, move in zip(leaves, pieces, strict=True)]
        return jax.tree.unflatten(tree, leaves), (carry, x, z)

    def output(self, carry: Any) -> Array:
        return self.cell.output(carry)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the carry's arrays for one sequence."""
        return [a.shape for a in jax.tree.leaves(jax.eval_shape(self.cell.initial_carry))]


def backward(
    call: str,
    loss: Callable[[Any, Array], Array],
    cell: Cell,
    params: PyTree,
    xs: Any,
    initial_carry: Any,
    seq_lengths: Any,
    resets: Any,
    reset_carry: Any,
) -> Backward:
    """Checks, runs the cell and the loss, and pulls the loss back once."""
    xs = jnp.asarray(xs)
    options = {"initial_carry": initial_carry, "seq_lengths": seq_lengths, "resets": resets, "reset_carry": reset_carry}
    explain_backend(cell, params, xs, **options)  # all checks of `unroll`, in the caller's own terms
    if xs.shape[-2] == 0:
        raise ValueError(f"`{call}(xs=<{xs.dtype} {xs.shape}>)`: no steps; expected T of at least 1.")
    _check_values(call, params, xs, initial_carry, seq_lengths)

    moved = Moved(cell.hidden_size, cell)
    z = jax.eval_shape(cell.project, params, jax.ShapeDtypeStruct(xs.shape[-1:], xs.dtype))
    dtype = jax.tree.leaves(z)[0].dtype
    if initial_carry is None:
        initial_carry = cell.initial_carry(xs.shape[:-2], dtype)
    if resets is not None and reset_carry is None:
        # As a constant: dL/ds_0 is that of the state before the first step, not of what resets return to.
        reset_carry = initial_carry
    # In the dtype that the projection brings them to anyway, so that no gradient is rounded to that of xs.
    zeros = jnp.zeros((*xs.shape[:-1], sum(map(math.prod, moved.shapes))), dtype)
    full = _without_gaps(cell, params, xs.shape[-1])

    def run(start: Any, wide: Array) -> Any:
        carry, outputs, states = unroll(
            moved, full, wide, initial_carry=start, seq_lengths=seq_lengths, resets=resets, reset_carry=reset_carry,
            return_states=True,
        )  # fmt: skip
        return (carry, outputs), states.gates

    wide = jnp.concatenate([xs.astype(dtype), zeros], -1)
    ends, pull, (before, ran, zs) = jax.vjp(run, initial_carry, wide, has_aux=True)
    value, d_ends = _pull_loss(call, loss, *ends)
    first, wide = pull(d_ends)
    lead, size = len(xs.shape) - 1, xs.shape[-1]
    check_finite(f"{call}(...)", (first, wide), "the gradient leaves the floating-point range; shorten or use float64")

    leaves, tree = jax.tree.flatten(first)
    pieces = jax.lax.split(wide[..., size:], [math.prod(shape) for shape in moved.shapes], lead)
    states = [
        jnp.concatenate([a[(slice(None),) * (lead - 1) + (None,)], move.reshape(*xs.shape[:-1], *shape)], lead - 1)
        for a, move, shape in zip(leaves, pieces, moved.shapes, strict=True)
    ]
    return Backward(value, jax.tree.unflatten(tree, states), wide[..., :size].astype(xs.dtype), before, ran, zs)


def _pull_loss(call: str, loss: Callable, carry: Any, outputs: Array) -> tuple[Array, Any]:
    """(value, gradients in the last carry and the outputs)."""
    value, pull = jax.vjp(loss, carry, outputs)
    if jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise ValueError(
            f"`{call}(loss=...)`: it returned <{jnp.result_type(value)} {jnp.shape(value)}>, expected one "
            "floating-point number for the whole batch; sum or average it, or pick one loss term."
        )
    return value, pull(jnp.ones_like(value))


def _check_values(call: str, params: PyTree, xs: Array, initial_carry: Any, seq_lengths: Any) -> None:
    advice = "find out where they come from before measuring gradients"
    check_finite(f"{call}(params=...)", params, advice)
    check_finite(f"{call}(initial_carry=...)", initial_carry, advice)
    if seq_lengths is not None:
        # As in `unroll`, NaN in the padding is none of ours.
        lengths = _lengths.check_lengths(seq_lengths, xs.shape[:-2], xs.shape[-2])
        xs = _lengths.blank_padding(jnp.moveaxis(xs, -2, 0), lengths)
    check_finite(f"{call}(xs=...)", xs, advice)


def _without_gaps(cell: Cell, params: PyTree, features: int) -> PyTree:
    """Parameters with zeros for biases that are None, as a cell that is not pointwise must have them."""
    if not isinstance(cell, PointwiseCell):
        return params
    whole = jax.eval_shape(lambda: cell.init(jax.random.key(0), features, params.input_kernel.dtype))
    for name in ("bias", "recurrent_bias"):
        if getattr(params, name) is None and getattr(whole, name) is not None:
            zeros = jnp.zeros(getattr(whole, name).shape, params.input_kernel.dtype)
            params = params._replace(**{name: zeros})
    return params if cell.units else params._replace(units=whole.units)
