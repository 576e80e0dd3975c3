"""How a recurrence is mapped to the thread blocks of a GPU: a pure function of its shapes.

A block keeps U of a whole head in shared memory.  The matrix unit of a warpgroup multiplies 64 rows at a time.  Where a
head has a multiple of 64 units, these rows are units and the batch is the short side, so that a batch of 8 wastes
nothing ("units"); otherwise they are sequences ("batch").
"""

from __future__ import annotations

import dataclasses
import math

from rnncore.cells.base import PointwiseCell
from rnncore.kernels import host, kernel_body

SHARED_BYTES = 227 * 1024
"""Shared memory of a block on Hopper."""
PROCESSORS = 132
"""Multiprocessors of an H100 or H200 (SXM): how many blocks of this size run at once."""
ROWS = 64
"""Rows that the matrix unit of a warpgroup takes at a time."""
DEPTH = (4, 3)
"""Steps whose inputs are in shared memory at once, at most, forward and backward."""
SLOTS = 2
"""Copies of h, or of dr, in shared memory: warpgroups may be a step apart."""
_RESERVED = 2048  # barriers, and what the compiler reserves


@dataclasses.dataclass(frozen=True)
class Plan:
    """A layout.

    Fields:
      heads, size, gates: N, d, G.
      rows: "units" or "batch": what lies along the 64 rows of a product.
      units: to a warpgroup.
      groups: warpgroups to a block.
      batch: sequences to a tile, a multiple of 8.
      tiles: batch tiles.
      stages: steps whose inputs are in shared memory at once, forward and backward.
      bytes: of shared memory that a block needs, of the larger kernel.
    """

    heads: int
    size: int
    gates: int
    rows: str
    units: int
    groups: int
    batch: int
    tiles: int
    stages: tuple[int, int]
    bytes: int

    @property
    def tile(self) -> tuple[int, int]:
        """Shape of a tile in registers."""
        return (ROWS, self.batch) if self.rows == "units" else (ROWS, self.units)

    @property
    def lines(self) -> int:
        """Sequences to a tile in shared memory."""
        return self.batch if self.rows == "units" else ROWS


@dataclasses.dataclass(frozen=True)
class Load:
    """What the kernels hold of a step besides h and U, in tiles: inputs (per stage) and staging for outputs."""

    forward_inputs: int
    forward_staged: int
    backward_inputs: int
    backward_staged: int


def load(gates: int, rest: int, fields: int, residuals: int, masked: bool, resets: bool) -> Load:
    """The tiles of a cell with G gates, `rest` of them with an r apart, and these fields of the carry."""
    return Load(
        forward_inputs=gates + masked,
        forward_staged=fields + (gates if resets else 0),
        backward_inputs=residuals + 1 + masked,
        backward_staged=max(rest, fields),
    )


def plan_of(cell: PointwiseCell, rows: int, masked: bool, resets: bool) -> Plan | str:
    """The layout for a cell and this many sequences, or the reason why there is none."""
    size = host.head_size(cell)
    return choose(cell.hidden_size // size, size, len(cell.gates), rows, needs(cell, masked, resets))


def needs(cell: PointwiseCell, masked: bool, resets: bool) -> Load:
    """What the kernels of a cell hold of a step."""
    part = kernel_body.of(cell, (64, 8))
    return load(len(cell.gates), len(part.rest), len(cell.Carry._fields), part.width, masked, resets)


def choose(heads: int, size: int, gates: int, rows: int, load: Load) -> Plan | str:
    """The plan for `rows` sequences, or the reason why there is none."""
    if size % 16:
        return f"the matrix unit takes 16 units at a time, and a product over {size} units is not a multiple of that"
    why = (
        f"one thread block takes heads of a multiple of 64 units, or of up to {256 // gates} with {gates} gates, and "
        f"these have {size}; backend='cuda' takes any"
    )
    for shape in _shapes(size, gates):
        plans = [_fitted(heads, size, gates, shape, batch, rows, load) for batch in _batches(shape, rows)]
        fitting = [plan for plan in plans if isinstance(plan, Plan)]
        if fitting:
            # The narrowest tile of which all run at once; where none does, the widest, which wait the least.
            return next((plan for plan in fitting if plan.heads * plan.tiles <= PROCESSORS), fitting[-1])
        why = str(plans[-1])
    return why


def _shapes(size: int, gates: int) -> list[tuple[str, int, int]]:
    """(rows, units, groups), the preferred one first."""
    shapes = []
    if size % ROWS == 0:
        shapes.append(("units", ROWS, size // ROWS))
    if gates * size <= 256:
        shapes.append(("batch", size, 1))
    return shapes


def _batches(shape: tuple[str, int, int], count: int) -> list[int]:
    """Widths of a batch tile to try."""
    rows, _, groups = shape
    if groups > 1:
        return [8]  # of wider ones a warpgroup's part of h does not lie in one piece, as the copy engine wants it
    whole = 8 * math.ceil(count / 8)
    return [b for b in (8, 16, 32) if b <= whole] if rows == "units" else [min(ROWS, whole)]


def _fitted(
    heads: int, size: int, gates: int, shape: tuple[str, int, int], batch: int, count: int, load: Load
) -> Plan | str:
    rows, units, groups = shape
    plan = Plan(heads, size, gates, rows, units, groups, batch, math.ceil(count / batch), (1, 1), 0)
    tile = 2 * plan.lines * size
    room = SHARED_BYTES - _RESERVED - 2 * gates * size * size
    forward = room - SLOTS * tile - load.forward_staged * tile
    backward = room - SLOTS * gates * tile - load.backward_staged * tile
    stages = (forward // (load.forward_inputs * tile), backward // (load.backward_inputs * tile))
    if min(stages) < 2:
        return (
            f"its recurrent kernel of {gates} x {size} x {size} does not fit the shared memory of one thread block, "
            f"{SHARED_BYTES} bytes; backend='cuda' shares a head among blocks"
        )
    deep = (min(DEPTH[0], stages[0]), min(DEPTH[1], stages[1]))
    left = min(forward - deep[0] * load.forward_inputs * tile, backward - deep[1] * load.backward_inputs * tile)
    return dataclasses.replace(plan, stages=deep, bytes=SHARED_BYTES - left)
