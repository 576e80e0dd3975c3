"""How a recurrence is laid over the thread blocks of a GPU: a pure function of its shapes.

A block keeps the rows of U for `units` x G pre-activations in shared memory.  The matrix unit of a warpgroup
multiplies 64 rows at a time.  Where 64 units or a multiple of them share a block, these rows are units and the
batch is the short side, so that a batch of 8 wastes nothing ("units"); otherwise they are sequences ("batch").
Where U does not fit one block, `blocks` of them share a head and exchange h after every step: up to 16 as a
cluster, which the hardware runs together, more as a grid whose blocks all have to be running at once.
"""

from __future__ import annotations

import dataclasses
import math

import jax

from rnncore.cells.base import PointwiseCell
from rnncore.kernels import host, kernel_body

SHARED_BYTES = 227 * 1024
"""Shared memory of a block on Hopper."""
PROCESSORS = 132
"""Multiprocessors of an H100 or H200 (SXM): how many blocks of this size run at once."""
CLUSTER = 16
"""Blocks to a cluster at most."""
PORTABLE = 8
"""Blocks to a cluster that every GPU with clusters can schedule; Hopper may take more, where its processors allow."""
KINDS = ("block", "cluster", "wide cluster", "grid")
"""What a layout can be, see `Plan.kind`."""
ROWS = 64
"""Rows that the matrix unit of a warpgroup takes at a time."""
DEPTH = (4, 3)
"""Steps whose inputs are in shared memory at once, at most, forward and backward."""
_RESERVED = 2048  # barriers, and what the compiler keeps for itself


@dataclasses.dataclass(frozen=True)
class Plan:
    """A layout.

    Fields:
      heads, size, gates: N, d, G.
      rows: "units" or "batch": what lies along the 64 rows of a product.
      units: to a warpgroup.
      groups: warpgroups to a block.
      blocks: that share a head and a batch tile.
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
    blocks: int
    batch: int
    tiles: int
    stages: tuple[int, int]
    bytes: int

    @property
    def sync(self) -> str | None:
        """How blocks wait for each other: "cluster", "grid" or not at all."""
        return None if self.blocks == 1 else "cluster" if self.blocks <= CLUSTER else "grid"

    @property
    def kind(self) -> str:
        """Of KINDS: what has to be proved on a GPU before a layout like this one is trusted there."""
        return "wide cluster" if self.sync == "cluster" and self.blocks > PORTABLE else self.sync or "block"

    @property
    def tile(self) -> tuple[int, int]:
        """Shape of a tile in registers."""
        return (ROWS, self.batch) if self.rows == "units" else (ROWS, self.units)

    @property
    def lines(self) -> int:
        """Sequences to a tile in shared memory."""
        return self.batch if self.rows == "units" else ROWS

    @property
    def gates_together(self) -> bool:
        """Whether the rows of one product hold the cotangents of all gates, so that they come in one load."""
        return self.rows == "batch" and self.blocks > 1 and self.gates * self.batch <= ROWS

    @property
    def sum_rows(self) -> int:
        """Rows of float32 in shared memory over which such a product is summed: see `backward.py`."""
        return self.gates * ROWS + (self.gates - 1) * self.batch if self.gates_together else 0

    @property
    def slots(self) -> int:
        """Copies of h, or of dr, in shared memory: two where warpgroups may be a step apart."""
        return 2 if self.blocks == 1 else 1


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
        backward_staged=max(gates + rest, fields, 1),
    )


def plan_of(cell: PointwiseCell, rows: int, masked: bool, resets: bool) -> Plan | str:
    """The layout for a cell and this many sequences, or the reason why there is none."""
    size = host.head_size(cell)
    return choose(cell.hidden_size // size, size, len(cell.gates), rows, needs(cell, masked, resets))


def too_few_processors(plan: Plan) -> str | None:
    """Reason why the GPU that is here cannot run all blocks of a grid at once, or None."""
    if plan.sync != "grid" or jax.default_backend() != "gpu":
        return None
    together, processors = plan.heads * plan.tiles * plan.blocks, getattr(jax.devices()[0], "core_count", PROCESSORS)
    if together <= processors:
        return None
    return f"{together} blocks would have to run at once, and this GPU has {processors} processors"


def needs(cell: PointwiseCell, masked: bool, resets: bool) -> Load:
    """What the kernels of a cell hold of a step."""
    part = kernel_body.of(cell, (64, 8))
    return load(len(cell.gates), len(part.rest), len(cell.Carry._fields), part.width, masked, resets)


def choose(heads: int, size: int, gates: int, rows: int, load: Load) -> Plan | str:
    """The plan for `rows` sequences, or the reason why there is none."""
    if size % 16:
        return f"the matrix unit takes 16 units at a time, and a product over {size} units is not a multiple of that"
    why = ""
    for shape in _shapes(size, gates):
        plans = [_fitted(heads, size, gates, shape, batch, rows, load) for batch in _batches(shape[0], shape[2], rows)]
        fitting = [plan for plan in plans if isinstance(plan, Plan)]
        if fitting and (fitting[-1].sync != "grid" or _at_once(fitting[-1])):
            # The narrowest tile of which all run at once; where none does, the widest, which wait the least.
            return next((plan for plan in fitting if _at_once(plan)), fitting[-1])
        if fitting:
            together = fitting[-1].heads * fitting[-1].tiles * fitting[-1].blocks
            why = f"{together} blocks would have to run at once, and there are {PROCESSORS} processors"
        else:
            why = str(plans[-1])
    return why


def _shapes(size: int, gates: int) -> list[tuple[str, int, int, int]]:
    """(rows, units, groups, blocks), the preferred ones first: one block, few blocks, many."""
    shapes = []
    if size % ROWS == 0 and size // ROWS <= 4:
        shapes.append(("units", ROWS, size // ROWS, 1))
    if gates * size <= 256:
        shapes.append(("batch", size, 1, 1))
    if size % ROWS == 0:
        shapes.append(("units", ROWS, 1, size // ROWS))
    narrow = [m for m in range(64, 7, -8) if size % m == 0 and gates * m <= 256 and m < size]
    return shapes + [("batch", m, 1, size // m) for m in narrow]


def _batches(rows: str, groups: int, count: int) -> list[int]:
    """Widths of a batch tile to try."""
    if groups > 1:
        return [8]  # of wider ones a warpgroup's part of h does not lie in one piece, as the copy engine wants it
    whole = 8 * math.ceil(count / 8)
    return [b for b in (8, 16, 32) if b <= whole] if rows == "units" else [min(ROWS, whole)]


def _fitted(
    heads: int, size: int, gates: int, shape: tuple[str, int, int, int], batch: int, count: int, load: Load
) -> Plan | str:
    rows, units, groups, blocks = shape
    plan = Plan(heads, size, gates, rows, units, groups, blocks, batch, math.ceil(count / batch), (1, 1), 0)
    tile = 2 * plan.lines * units * groups
    kernel = 2 * gates * units * groups * size
    whole = 2 * plan.lines * size
    room = SHARED_BYTES - _RESERVED - kernel
    forward = room - plan.slots * whole - load.forward_staged * tile
    backward = room - (plan.slots * gates if blocks == 1 else 1) * whole - load.backward_staged * tile
    backward -= 4 * plan.sum_rows * units
    stages = (forward // (load.forward_inputs * tile), backward // (load.backward_inputs * tile))
    if min(stages) < (1 if blocks > 1 else 2):
        return (
            f"its recurrent kernel of {gates} x {size} x {size} does not fit: {blocks} block(s) of {units * groups} "
            f"units would need more than {SHARED_BYTES - min(forward, backward)} bytes of shared memory each, "
            f"and there are {SHARED_BYTES}"
        )
    deep = (min(DEPTH[0], stages[0]), min(DEPTH[1], stages[1]))
    left = min(forward - deep[0] * load.forward_inputs * tile, backward - deep[1] * load.backward_inputs * tile)
    return dataclasses.replace(plan, stages=deep, bytes=SHARED_BYTES - left)


def _at_once(plan: Plan) -> bool:
    return plan.heads * plan.tiles * plan.blocks <= PROCESSORS
