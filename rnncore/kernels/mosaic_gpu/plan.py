"""How a recurrence is mapped to the thread blocks of a GPU: a pure function of its shapes.

A block keeps U of a whole head in shared memory.  The 64 rows of a matrix instruction are the units of the head, and
the batch is its short side, so that a batch of 8 wastes nothing.
"""

from __future__ import annotations

import dataclasses
import math

from rnncore.cells.base import PointwiseCell
from rnncore.kernels import host, kernel_body

UNITS = 64
"""Units of a head, which are the rows of a matrix instruction."""
SHARED_BYTES = 227 * 1024
"""Shared memory of a block on Hopper."""
PROCESSORS = 132
"""Multiprocessors of an H100 or H200 (SXM): how many blocks of this size run at once."""
DEPTH = (4, 3)
"""Steps whose inputs are in shared memory at once, at most, forward and backward."""
SLOTS = 2
"""Copies of h, or of dr, in shared memory: one is written while the other is read."""
_RESERVED = 2048  # barriers, and what the compiler reserves


@dataclasses.dataclass(frozen=True)
class Plan:
    """A layout.

    Fields:
      heads, gates: N, G.
      batch: sequences to a tile: 8, 16 or 32.
      tiles: batch tiles.
      stages: steps whose inputs are in shared memory at once, forward and backward.
      bytes: of shared memory that a block needs, of the larger kernel.
    """

    heads: int
    gates: int
    batch: int
    tiles: int
    stages: tuple[int, int]
    bytes: int


def plan_of(cell: PointwiseCell, rows: int, masked: bool, resets: bool) -> Plan | str:
    """The layout for a cell and this many sequences, or the reason why there is none."""
    size = host.head_size(cell)
    if size != UNITS:
        return f"its kernels are made for heads of {UNITS} units, and these have {size}; backend='cuda' takes any"
    batches = [b for b in (8, 16, 32) if b <= 8 * math.ceil(rows / 8)]
    plans = [_fitted(cell, batch, rows, masked, resets) for batch in batches]
    fitting = [plan for plan in plans if plan.bytes <= SHARED_BYTES]
    if not fitting:
        return (
            f"its recurrent kernel of {len(cell.gates)} x {size} x {size} and the inputs of two steps do not fit the "
            f"shared memory of one thread block, {SHARED_BYTES} bytes; backend='cuda' shares a head among blocks"
        )
    # The narrowest tile of which all run at once; where none does, the widest, which wait the least.
    return next((plan for plan in fitting if plan.heads * plan.tiles <= PROCESSORS), fitting[-1])


def _fitted(cell: PointwiseCell, batch: int, rows: int, masked: bool, resets: bool) -> Plan:
    """The layout with tiles of so many sequences, and with as many stages as there is room for, but at least two."""
    gates, fields, part = len(cell.gates), len(cell.Carry._fields), kernel_body.of(cell, (UNITS, 8))
    tile = 2 * batch * UNITS
    fixed = _RESERVED + 2 * gates * UNITS**2
    # What a kernel holds of a step besides U, in tiles: h or dr, staging for outputs; and for each stage its inputs.
    held = (
        fixed + tile * (SLOTS + fields + gates * resets),
        fixed + tile * (SLOTS * gates + max(len(part.rest), fields)),
    )
    inputs = tile * (gates + masked), tile * (part.width + 1 + masked)
    stages = [
        max(2, min(most, (SHARED_BYTES - a) // b)) for most, a, b in zip(DEPTH, held, inputs, strict=True)
    ]  # fmt: skip
    taken = max(a + n * b for a, n, b in zip(held, stages, inputs, strict=True))
    return Plan(cell.hidden_size // UNITS, gates, batch, math.ceil(rows / batch), (stages[0], stages[1]), taken)
