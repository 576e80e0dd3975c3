"""Calls of an `LSTMP`, which runs as a pointwise cell over another state."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rnncore._types import Array
from rnncore.cells.base import Cell
from rnncore.cells.projected_lstm import LSTMP
from rnncore.recurrence.run import Request


class Call(NamedTuple):
    """The call of `unroll` that stands for one of `of`."""

    of: LSTMP
    cell: Cell
    params: Any
    options: dict[str, Any]

    def outside(self, params: Any, options: Any, carry: Any, outputs: Array, states: Any = None) -> Any:
        """What it gave, as the caller of the other with these parameters and options has it."""
        last = self.of.leave(params, carry)
        start, lengths = options.initial_carry, options.seq_lengths
        if start is not None and lengths is not None:
            never = (jnp.asarray(lengths) <= 0)[..., None]
            last = jax.tree.map(lambda a, b: jnp.where(never, jnp.asarray(a, b.dtype), b), start, last)
        outputs = self.of.leave_output(params, outputs)
        if states is None:
            return last, outputs
        carries = self.of.leave(params, states.carries)
        if options.include_initial and start is not None:
            at = -1 if options.reverse and options.keep_order else 0
            axis = 0 if options.time_major else -2

            def put(a: Array, first: Any) -> Array:
                return jnp.moveaxis(jnp.moveaxis(a, axis, 0).at[at].set(first), 0, axis)

            carries = jax.tree.map(put, carries, start)
        return last, outputs, states._replace(carries=carries)


def inside(request: Request, params: Any, options: Any) -> Call | None:
    """The call of the pointwise cell, or None where the cell runs itself; of shapes, one of shapes."""
    cell = request.cell
    if not isinstance(cell, LSTMP) or options.backend == "autodiff" or request.steps == 0:
        return None
    zoneout = None if options.zoneout is None else cell.zoneout(options.zoneout)
    if request.recurrent_mask or (request.zoneout and zoneout is None):
        return None

    def enter(carry: Any) -> Any:
        return None if carry is None else cell.enter(params, carry)

    def moved() -> Any:
        return cell.pointwise_params(params), enter(options.initial_carry), enter(options.reset_carry)

    given = jax.tree.leaves((params, options.initial_carry))
    of_shapes = any(isinstance(a, jax.ShapeDtypeStruct) for a in given)
    inner, initial_carry, reset_carry = jax.eval_shape(moved) if of_shapes else moved()
    changed = {"initial_carry": initial_carry, "reset_carry": reset_carry, "zoneout": zoneout}
    return Call(cell, cell.pointwise_cell, inner, options._asdict() | changed)
