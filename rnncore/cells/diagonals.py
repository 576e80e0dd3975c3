"""The elementwise derivatives of a pointwise update, from which the Jacobian of a step is assembled."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rnncore.cells.base import CellParams, PointwiseCell


class Diagonals(NamedTuple):
    """d s_t of one step of a pointwise cell, every part for each field of the carry: diagonals (*batch, H).

    Fields:
      units: units.a.p is d a_t / d p for a per-unit parameter p.
      inputs: inputs.a.g is d a_t / d z_g for a gate g.
      recurrent: recurrent.a.g is d a_t / d r_g.
      state: state.a.b is d a_t / d b_{t-1} with r held fixed.
    """

    units: Any
    inputs: Any
    recurrent: Any
    state: Any


def diagonals(cell: PointwiseCell, params: CellParams, carry: Any, z: Any, r: Any) -> tuple[Any, Diagonals]:
    """(s_t, its `Diagonals`) for inputs z and r by gate, named tuples of (*batch, H)."""
    p = jax.tree.map(lambda u: jnp.broadcast_to(u, carry.h.shape), params.units)

    def every_field(*inputs: Any) -> Any:
        new, _ = cell.pointwise(*inputs)
        return tuple(n.astype(c.dtype) for n, c in zip(new, carry, strict=True))

    rows = []
    # For an elementwise function one vjp with ones gives the diagonals for all inputs at once.
    for n in range(len(carry)):
        y, pull = jax.vjp(lambda *inputs, n=n: every_field(*inputs)[n], p, z, r, carry)
        rows.append((y, *pull(jnp.ones_like(y))))
    new, *parts = (type(carry)(*column) for column in zip(*rows, strict=True))
    return new, Diagonals(*parts)
