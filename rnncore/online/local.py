"""One step of a pointwise cell for online learning: the effect of each parameter on its own unit.

Every parameter belongs to one unit: W[:, :, i], U[:, :, i], b[:, i] and p[i] reach unit i first, and the others through
its output.  A `Piece` holds parameters of one kind, for each unit R rows of C columns, with

  d s_i / d piece[row, column, i] = value[row, i] coefficient[column, i]
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from rnncore._types import Array
from rnncore.cells import pointwise
from rnncore.cells.base import CellParams, PointwiseCell
from rnncore.cells.blocks import blocks_of, from_blocks, within
from rnncore.cells.diagonals import Diagonals, diagonals


class Piece(NamedTuple):
    """The effect of one kind of parameter within a step.

    Fields:
      values: (*batch, R, H), or (*batch, R, 1) where all units read the same.
      coefficients: the carry's named tuple of (*batch, C, H).
    """

    values: Array
    coefficients: Any


class Local(NamedTuple):
    """A step and its derivatives.

    Fields:
      carry: s_t.
      diagonals: d s_t by the elementwise inputs.
      pieces: for each kind of parameter, in the order of `from_pieces`.
    """

    carry: Any
    diagonals: Diagonals
    pieces: tuple[Piece, ...]


def all_additive(cell: PointwiseCell) -> bool:
    """Whether W x, U h and b act as their sum alone, so that one piece holds them all."""
    example = pointwise.examples(cell, jnp.ones((cell.hidden_size,)))
    return not cell.recurrent_bias and all(pointwise.additive_gates(cell, *example))


def local_step(cell: PointwiseCell, params: CellParams, carry: Any, x: Array) -> Local:
    """One step from carry (*batch, H) and inputs x (*batch, D)."""
    z, r = cell.split(cell.project(params, x)), cell.split(cell.recurrent_matmul(params, carry.h))
    new, parts = diagonals(cell, params, carry, z, r)

    def stacked(by_field: Any) -> Any:
        return type(carry)(*(jnp.stack(list(row), -2) for row in by_field))

    h = carry.h
    ones = jnp.ones_like(x[..., :1])
    read = (jnp.concatenate([x, ones], -1) if params.bias is not None else x)[..., None]
    seen = within(blocks_of(cell.recurrence, cell.hidden_size), h)
    if all_additive(cell):
        read = jnp.broadcast_to(read, (*read.shape[:-1], h.shape[-1])).astype(h.dtype)
        pieces = [Piece(jnp.concatenate([read, seen], -2), stacked(parts.inputs))]
    else:
        if params.recurrent_bias is not None:  # a column for every gate; those without such a bias are not read
            seen = jnp.concatenate([seen, jnp.ones_like(seen[..., :1, :])], -2)
        pieces = [Piece(read.astype(h.dtype), stacked(parts.inputs)), Piece(seen, stacked(parts.recurrent))]
    if len(params.units):
        pieces.append(Piece(ones[..., None].astype(h.dtype), stacked(parts.units)))
    return Local(new, parts, tuple(pieces))


def piece_shapes(cell: PointwiseCell, params: CellParams) -> tuple[tuple[int, int], ...]:
    """(R, C) of every piece."""
    features, gates, _ = params.input_kernel.shape
    size = blocks_of(cell.recurrence, cell.hidden_size).size
    read = features + (params.bias is not None)
    seen = size + (params.recurrent_bias is not None)
    shapes = [(read + seen, gates)] if all_additive(cell) else [(read, gates), (seen, gates)]
    return tuple(shapes + ([(1, len(params.units))] if len(params.units) else []))


def from_pieces(cell: PointwiseCell, params: CellParams, pieces: tuple[Array, ...]) -> CellParams:
    """The parameters' tree from arrays (R, C, H), one for each piece."""
    features, gates, hidden = params.input_kernel.shape
    blocks = blocks_of(cell.recurrence, hidden)
    both, *rest = pieces
    read = features + (params.bias is not None)
    seen = both[read:] if both.shape[0] > read else rest.pop(0)
    recurrent_bias = None
    if params.recurrent_bias is not None:
        recurrent_bias = seen[blocks.size, jnp.array([cell.gates.index(g) for g in cell.recurrent_bias])]
    kernel = seen[: blocks.size].reshape(blocks.size, gates, blocks.number, blocks.size)
    return CellParams(
        input_kernel=both[:features],
        recurrent_kernel=from_blocks(cell.recurrence, kernel),
        bias=None if params.bias is None else both[features],
        recurrent_bias=recurrent_bias,
        units=type(params.units)(*rest[0][0]) if rest else params.units,
    )
