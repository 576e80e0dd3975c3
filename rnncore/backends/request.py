"""What a backend is asked for, and what it gives back."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from rnncore._types import Array, Differentiation
from rnncore.cells.base import Cell


@dataclasses.dataclass(frozen=True)
class Request:
    """All that is static about a run: backends are chosen by this alone.

    Fields:
      cell: the cell.
      steps, batch_shape, input_size: T, the batch axes, D.
      dtype: name of the dtype of the projected inputs.
      platform, devices: "cpu", "gpu" or "tpu", and how many of them this process sees.
      lengths, resets, states: whether the run has lengths, has resets, must return states.
      differentiation: "any" or "reverse".
      checkpoint_every: steps to a chunk; None lets the backend choose.
      recompute: "nothing", "gates" or "chunk".
    """

    cell: Cell
    steps: int
    batch_shape: tuple[int, ...]
    input_size: int
    dtype: str
    platform: str
    devices: int
    lengths: bool
    resets: bool
    states: bool
    differentiation: Differentiation
    checkpoint_every: int | None
    recompute: str


class Result(NamedTuple):
    """carry: after the last valid step; outputs (T, *batch, H); carries and gates stacked, or None."""

    carry: Any
    outputs: Array
    carries: Any
    gates: Any
