"""All steps of a run at once, from a guess of every state: their results and derivatives."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rnncore._types import Array
from rnncore.cells.base import CellParams, PointwiseCell
from rnncore.cells.blocks import blocks_of, jacobian, own_gain
from rnncore.cells.diagonals import Diagonals, diagonals
from rnncore.recurrence import linear
from rnncore.recurrence import step as steps


class Operands(NamedTuple):
    """What the steps depend on, time-major.

    Fields:
      params: of the cell over a plain structure.
      zs: the projected inputs (T, *batch, G*H).
      start: the carry before the first step, (*batch, H) arrays.
      reset_carry: what a reset returns to; None without resets.
    """

    params: CellParams
    zs: Array
    start: Any
    reset_carry: Any


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The steps of a cell, all at once.

    Fields:
      cell: over Dense(), Heads(N) or Diagonal().
      own: follow each unit's own recurrence only (quasi-Newton); exact over Diagonal().
    """

    cell: PointwiseCell
    own: bool

    def before(self, operands: Operands, resets: Array | None, states: Any) -> Any:
        """What every step begins with."""
        previous = jax.tree.map(lambda a, s: jnp.concatenate([a[None], s[:-1]]), operands.start, states)
        return steps.reset(resets, operands.reset_carry, previous)

    def after(self, operands: Operands, before: Any) -> tuple[Any, Diagonals]:
        """(f(s_{t-1}, x_t), its elementwise derivatives) for all t."""
        cell = self.cell
        r = cell.split(cell.recurrent_matmul(operands.params, before.h))
        return diagonals(cell, operands.params, before, cell.split(operands.zs), r)

    def guess(self, operands: Operands) -> Any:
        """f(0, x_t)."""
        shape = operands.zs.shape[:-1]
        zeros = jax.tree.map(lambda a: jnp.zeros((*shape, a.shape[-1]), a.dtype), operands.start)
        return self.after(operands, zeros)[0]

    def jacobian(self, params: CellParams, parts: Diagonals, resets: Array | None) -> Any:
        """d s_t / d s_{t-1}, 0 at resets: F tuples of F arrays (T, *batch, H) by unit, or (T, *batch, N, FS, FS)."""
        if resets is not None:
            parts = jax.tree.map(lambda a: jnp.where(resets, 0, a), parts)
        blocks = blocks_of(self.cell.recurrence, self.cell.hidden_size)
        if self.own or blocks.size == 1:
            return tuple(tuple(row) for row in own_gain(self.cell, params, parts))
        fields = parts.state._fields
        rows = ([jacobian(self.cell, params, parts, n, name) for name in fields] for n in range(len(fields)))
        return jnp.concatenate([jnp.concatenate(row, -1) for row in rows], -2)

    def solve(self, jacobian: Any, added: Any) -> Any:
        """u_t = J_t u_{t-1} + added_t with u_0 = 0, for a carry of (T, *batch, H) arrays."""
        if isinstance(jacobian, tuple):
            return type(added)(*linear.by_units(jacobian, tuple(added)))
        number, size = jacobian.shape[-3], jacobian.shape[-1] // len(added)
        flat = jnp.concatenate([a.reshape(*a.shape[:-1], number, size) for a in added], -1)
        parts = jnp.split(linear.by_blocks(jacobian, flat), len(added), -1)
        return type(added)(*(u.reshape(a.shape) for u, a in zip(parts, added, strict=True)))

    def solve_exactly(self, params: CellParams, parts: Diagonals, resets: Array | None, added: Any) -> Any:
        """`solve` with the whole of J: step by step where only its own units' part is formed."""
        blocks = blocks_of(self.cell.recurrence, self.cell.hidden_size)
        if not self.own or blocks.size == 1:
            return self.solve(self.jacobian(params, parts, resets), added)
        if resets is not None:
            parts = jax.tree.map(lambda a: jnp.where(resets, 0, a), parts)
        product = params._replace(recurrent_bias=None)

        def advance(now: Any, u: Any) -> Any:
            state, recurrent = now
            dr = self.cell.split(self.cell.recurrent_matmul(product, u.h))
            rows = zip(state, recurrent, strict=True)
            return type(u)(*(
                sum(a * b for a, b in zip((*direct, *through), (*u, *dr), strict=True)) for direct, through in rows
            ))  # fmt: skip

        return linear.in_order(advance, ((parts.state, parts.recurrent), added))
