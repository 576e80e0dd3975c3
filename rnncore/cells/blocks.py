"""A recurrent kernel as N blocks of S units that see only each other.

Dense is one block of H units, `Heads(N)` is N of H/N, `Diagonal` is H of one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from rnncore._types import Array
from rnncore.cells.base import CellParams, PointwiseCell
from rnncore.cells.diagonals import Diagonals
from rnncore.cells.recurrent_kernels import Dense, Diagonal, Heads, Recurrence


class Blocks(NamedTuple):
    """`number` N of blocks of `size` S units."""

    number: int
    size: int

    def apart(self, a: Array) -> Array:
        """(..., H) as (..., N, S)."""
        return a.reshape(*a.shape[:-1], self.number, self.size)


def blocks_of(recurrence: Recurrence, hidden_size: int) -> Blocks:
    """The blocks of a structure; NotImplementedError for one whose blocks are not known."""
    if isinstance(recurrence, Dense):
        return Blocks(1, hidden_size)
    if isinstance(recurrence, Heads):
        return Blocks(recurrence.num_heads, hidden_size // recurrence.num_heads)
    if isinstance(recurrence, Diagonal):
        return Blocks(hidden_size, 1)
    raise NotImplementedError(
        f"`recurrence={recurrence}`: expected Dense(), Heads(N) or Diagonal(); of another structure it is not known "
        "which units see each other."
    )


def to_blocks(recurrence: Recurrence, kernel: Array) -> Array:
    """The kernel as (S, G, N, S): from unit, gate, block, to unit."""
    if isinstance(recurrence, Dense):
        return kernel[:, :, None]
    if isinstance(recurrence, Heads):
        return jnp.transpose(kernel, (1, 2, 0, 3))
    return kernel[None, :, :, None]


def from_blocks(recurrence: Recurrence, blocks: Array) -> Array:
    """The kernel from what `to_blocks` makes of it."""
    if isinstance(recurrence, Dense):
        return blocks[:, :, 0]
    if isinstance(recurrence, Heads):
        return jnp.transpose(blocks, (2, 0, 1, 3))
    return blocks[0, :, :, 0]


def within(blocks: Blocks, h: Array) -> Array:
    """For every unit the outputs that it sees: (*batch, H) to (*batch, S, H)."""
    seen = jnp.swapaxes(blocks.apart(h), -1, -2)[..., None]
    seen = jnp.broadcast_to(seen, (*seen.shape[:-1], blocks.size))
    return seen.reshape(*h.shape[:-1], blocks.size, h.shape[-1])


def jacobian(cell: PointwiseCell, params: CellParams, parts: Diagonals, to: int, source: str) -> Array:
    """d (field number `to` of s_t) / d (field `source` of s_{t-1}) within the blocks: (*batch, N, S, S)."""
    blocks = blocks_of(cell.recurrence, cell.hidden_size)
    direct = blocks.apart(getattr(parts.state[to], source))[..., None]
    direct = direct * jnp.eye(blocks.size, dtype=direct.dtype)
    if source != "h":
        return direct
    weights = blocks.apart(jnp.stack(list(parts.recurrent[to]), -2))
    kernel = to_blocks(cell.recurrence, params.recurrent_kernel)
    return direct + jnp.einsum("...gni,lgni->...nil", weights, kernel)


def own_gain(cell: PointwiseCell, params: CellParams, parts: Diagonals) -> Any:
    """d s_t / d s_{t-1} of each unit by itself: the diagonal of every block of the Jacobian, field by field."""
    kernel = to_blocks(cell.recurrence, params.recurrent_kernel)
    size = kernel.shape[0]
    own = kernel[jnp.arange(size), :, :, jnp.arange(size)]  # (S, G, N)
    own = jnp.moveaxis(own, 0, -1).reshape(kernel.shape[1], -1)
    # One sum over stacked gates: XLA then forms the stack once a step, and not for every parameter that reads it.
    through = [jnp.sum(jnp.stack(list(row), -2) * own, -2) for row in parts.recurrent]
    rows = (row._replace(h=row.h + t) for row, t in zip(parts.state, through, strict=True))
    return type(parts.state)(*rows)
