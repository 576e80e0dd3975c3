"""One run of a cell and one backward pass through it that yields the gradient at every state.

Zeros are added to every state, and the loss is differentiated with respect to them.  They enter as additional
features of the inputs, so that `unroll` itself runs and differentiates, with its lengths, resets and carries.
Everything else about a step (its gates, its contribution to the gradient of a parameter) is local: it follows
from the gradient at the state after the step, for all steps at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rnncore import _lengths
from rnncore._types import Array, PyTree
from rnncore.analysis.run.flat import states_of
from rnncore.analysis.run.trajectory import check_finite, check_loss, check_takes
from rnncore.cells.base import Cell, PointwiseCell
from rnncore.layers.recording import Moved, without_gaps
from rnncore.recurrence.step import spread_units
from rnncore.sequence.call import explain_backend, unroll

Loss = Callable[[Any, Array], Array]
"""(carry, outputs), as `rnncore.unroll` returns them with their batch axes, to one number."""


class Backward(NamedTuple):
    """The results of one backward pass, batch-major.

    Fields:
      value: the loss.
      states: dL/ds_t, a carry of arrays (*batch, T + 1, ...).
      inputs: dL/dx_t, (*batch, T, D).
      before: the carry that each step starts from, after resets, (*batch, T, ...).
      xs: the inputs of the run, (*batch, T, D).
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


def backward(
    call: str,
    loss: Loss,
    cell: Cell,
    params: PyTree,
    xs: Any,
    initial_carry: Any = None,
    seq_lengths: Any = None,
    resets: Any = None,
    reset_carry: Any = None,
) -> Backward:
    """Checks, runs the cell and the loss, and pulls the loss back once."""
    check_takes(call, loss, "(carry, outputs)")
    xs = jnp.asarray(xs)
    options = {"initial_carry": initial_carry, "seq_lengths": seq_lengths, "resets": resets, "reset_carry": reset_carry}
    explain_backend(cell, params, xs, **options)  # runs the checks of `unroll` on the caller's arguments
    if xs.shape[-2] == 0:
        raise ValueError(f"`{call}(xs=<{xs.dtype} {xs.shape}>)`: no steps; expected T of at least 1.")
    _check_values(call, params, xs, initial_carry, seq_lengths)

    moved = Moved(cell.hidden_size, cell)
    z = jax.eval_shape(cell.project, params, jax.ShapeDtypeStruct(xs.shape[-1:], xs.dtype))
    dtype = jax.tree.leaves(z)[0].dtype
    if initial_carry is None:
        initial_carry = cell.initial_carry(xs.shape[:-2], dtype)
    if resets is not None and reset_carry is None:
        # As a constant: dL/ds_0 belongs to the state before the first step, not to the reset carry.
        reset_carry = initial_carry
    # In the dtype of the projection, so that no gradient is rounded to that of xs.
    zeros = jnp.zeros((*xs.shape[:-1], sum(map(math.prod, moved.shapes))), dtype)
    full = without_gaps(cell, params, xs.shape[-1])

    def run(start: Any, wide: Array) -> Any:
        carry, outputs, states = unroll(
            moved, full, wide, initial_carry=start, seq_lengths=seq_lengths, resets=resets, reset_carry=reset_carry,
            return_states=True,
        )  # fmt: skip
        before, ran, zs, _ = states.gates
        return (carry, outputs), (before, ran, zs)

    wide = jnp.concatenate([xs.astype(dtype), zeros], -1)
    ends, pull, (before, ran, zs) = jax.vjp(run, initial_carry, wide, has_aux=True)
    value, pull_loss = jax.vjp(loss, *ends)
    check_loss(call, value)
    first, wide = pull(pull_loss(jnp.ones_like(value)))
    size = xs.shape[-1]
    check_finite(f"{call}(...)", (first, wide), "the gradient leaves the floating-point range; shorten or use float64")

    states = states_of(first, wide[..., size:], xs.ndim - 2)
    return Backward(value, states, wide[..., :size].astype(xs.dtype), before, ran, zs)


def through_gates(cell: PointwiseCell, params: PyTree, done: Backward) -> tuple[Any, Any, Any]:
    """(dL/dz, dL/dr, dL/ds_{t-1} with r held fixed), the first two by gate: elementwise in dL/ds_t."""
    before = done.before
    with jax.default_matmul_precision("highest"):
        r = cell.split(cell.recurrent_matmul(params, before.h))
    units = spread_units(params, before.h)

    def new(z: Any, r: Any, carry: Any) -> Any:
        moved, _ = cell.pointwise(units, z, r, carry)
        return jax.tree.map(lambda n, c: n.astype(c.dtype), moved, carry)

    _, pull = jax.vjp(new, cell.split(done.zs), r, before)
    return pull(done.after)


def _check_values(call: str, params: PyTree, xs: Array, initial_carry: Any, seq_lengths: Any) -> None:
    check_finite(f"{call}(params=...)", params)
    check_finite(f"{call}(initial_carry=...)", initial_carry)
    if seq_lengths is not None:
        # As in `unroll`, the padding may hold NaN.
        lengths = _lengths.check_lengths(seq_lengths, xs.shape[:-2], xs.shape[-2])
        xs = _lengths.blank_padding(jnp.moveaxis(xs, -2, 0), lengths)
    check_finite(f"{call}(xs=...)", xs)
