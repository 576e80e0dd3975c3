"""Backend "pallas_tpu": how the work is mapped to the chip, a pure function of shapes and dtypes.

A register tile is 8 rows of 128 lanes of 32 bits, 16 rows in bfloat16, and only slices at multiples of that are free.
So units are laid out in blocks of a multiple of 128, the recurrent kernel in square blocks of these for every gate, the
batch in tiles of rows, and time in blocks of steps.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp

from rnncore.cells.base import PointwiseCell
from rnncore.kernels import kernel_body
from rnncore.kernels.host import head_size

LANES = 128

VMEM_LIMIT = 16 * 2**20
"""Bytes of fast memory that a kernel may take: what the compiler gives without being asked on every TPU.

The chips have 16 MiB (v2 to v4), 64 (v5p, v7) or 128 (v5e, v6e).  To use more raise this, and give XLA the flag
--xla_tpu_scoped_vmem_limit_kib with at least as much.
"""

RESERVE = 2**20
"""Bytes of it that are left to the compiler."""

MAX_ROWS = 256
"""Rows of a tile: more would no longer hide that the matrix unit loads the recurrent kernel in every step."""

MAX_STEPS = 32
"""Steps of a block: the resets of a block are the bits of one 32-bit word."""

FEW_STEPS = 4
"""Below that a tile gives up rows for steps, so that fetching a block has some steps to hide behind."""


class Plan(NamedTuple):
    """A layout.

    Fields:
      heads: how many heads make one block of the recurrent kernel.
      blocks: how many blocks there are.
      real: units of a block; width: the same with padding.
      tiles, rows: how many tiles the batch has, rows of one.
      spans, steps: how many blocks the time has, steps of one.
      bytes: of VMEM that it takes.
    """

    heads: int
    blocks: int
    real: int
    width: int
    tiles: int
    rows: int
    spans: int
    steps: int
    bytes: int

    @property
    def units(self) -> int:
        """Units with padding."""
        return self.blocks * self.width


def forward(cell: PointwiseCell, steps: int, rows: int, dtype: Any, kept: Any | None) -> Plan:
    """The layout of the forward kernel; `kept` is the dtype of the carry's other fields, None where they are not."""
    gates, fields, other = len(cell.gates), len(cell.Carry._fields), 0 if kept is None else _size(kept)
    return _plan(
        cell, steps, rows, dtype, kept,
        step=_size(dtype) * (gates + 1) + other * (fields - 1),
        # Two buffers of start, reset_carry and last, and the running carry.
        row=fields * (2 * 3 * 4 + 4),
        unit=len(cell.units) + gates,
        live=2 * (gates + fields),
    )  # fmt: skip


def backward(cell: PointwiseCell, steps: int, rows: int, dtype: Any, stored: Any) -> Plan:
    """The layout of the backward kernel; `stored` is the dtype of the residuals."""
    part, gates, fields = kernel_body.of(cell, (1, 1)), len(cell.gates), len(cell.Carry._fields)
    return _plan(
        cell, steps, rows, dtype, stored,
        step=_size(dtype) + _size(stored) * (part.width + gates + len(part.rest)),
        # Two buffers of the cotangents of last, start, reset_carry and units, and the running cotangent.
        row=fields * (2 * 3 * 4 + 4) + 2 * 4 * len(cell.units),
        unit=len(cell.units),
        live=2 * (gates + fields) + part.width,
    )  # fmt: skip


def _plan(
    cell: PointwiseCell, steps: int, rows: int, dtype: Any, other: Any | None, *, step: int, row: int, unit: int,
    live: int,
) -> Plan:  # fmt: skip
    """The largest tiles, and then the longest blocks of steps, that fit; the smallest of all where nothing does.

    Args:
      steps, rows: T, B.
      dtype, other: of the recurrent kernel, and of what is kept, if anything is.
      step: bytes for each unit, row and step of the blocks that the kernel reads and writes.
      row: bytes for each unit and row, of carries and cotangents.
      unit: how many parameters it reads for each unit.
      live: float32 numbers for each unit and row that one step works with.
    """
    gates, head = len(cell.gates), head_size(cell)
    heads, width = packing(cell.hidden_size, head)
    blocks = cell.hidden_size // (heads * head)
    # Rows of a tile of registers, of the smallest dtype.
    sublanes = 8 * 4 // min(_size(dtype), _size(dtype if other is None else other))

    def layout(tiles: int, span: int) -> Plan:
        tile = _up(math.ceil(rows / tiles), sublanes)
        spans = math.ceil(steps / span)
        span = math.ceil(steps / spans)  # as even as can be, so that few steps are padding
        units = blocks * width
        taken = RESERVE + blocks * width * gates * width * _size(dtype)
        taken += tile * units * (2 * span * step + row + 4 * live)
        # Lengths and resets take a lane of a register, parameters of units a row of it.
        taken += 4 * 2 * (2 * tile * LANES + 8 * units * unit)
        return Plan(heads, blocks, heads * head, width, math.ceil(rows / tile), tile, spans, span, taken)

    longest = min(MAX_STEPS, steps)
    tiles = math.ceil(rows / MAX_ROWS)
    while True:
        fitting = (layout(tiles, span) for span in range(longest, 0, -1))
        best = next((found for found in fitting if found.bytes <= VMEM_LIMIT), layout(tiles, 1))
        enough = best.bytes <= VMEM_LIMIT and best.steps >= min(FEW_STEPS, steps)
        if enough or best.rows == sublanes:
            return best
        tiles *= 2


def packing(hidden: int, head: int) -> tuple[int, int]:
    """(heads to a block of the recurrent kernel, units of a block with padding): what makes the kernel smallest.

    Heads below 128 units share a block, in which they stand on the diagonal.
    """
    count = hidden // head
    widths = {k: _up(k * head, LANES) for k in range(1, count + 1) if count % k == 0}
    heads = min(widths, key=lambda k: (count // k * widths[k] ** 2, count // k * widths[k]))
    return heads, widths[heads]


def _up(n: int, multiple: int) -> int:
    return math.ceil(n / multiple) * multiple


def _size(dtype: Any) -> int:
    return jnp.dtype(dtype).itemsize
