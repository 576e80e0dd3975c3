"""The two calls: layers and directions over a batch of sequences, forward, and back from what forward kept."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from rnncore._types import Array
from rnncore.kernels import ffi
from rnncore.kernels.cudnn import algorithm
from rnncore.kernels.cudnn.library import Kind, library
from rnncore.recurrence.batching import over_batch

CAPTURABLE = True
"""Whether XLA may put calls with full lengths, which wait for nothing, into a CUDA graph."""


class Inputs(NamedTuple):
    """What the library gets.

    Fields:
      x: (T, B, D).
      h, c: (layers * directions, B, H); c is (0,) but for an LSTM.
      weights: as `weights.pack` makes them.
      lengths: (B,) int32 from 1 to T, or (0,) where all sequences have T steps.
    """

    x: Array
    h: Array
    c: Array
    weights: Array
    lengths: Array


class Outputs(NamedTuple):
    """y (T, B, directions * H), the carry after the last step as `Inputs` has it, and what a backward call needs."""

    y: Array
    h: Array
    c: Array
    reserve: Array


@dataclasses.dataclass(frozen=True)
class Calls:
    """The calls of one kind of cell.

    Under vmap a forward call without a reserve takes mapped sequences into its batch.  All else runs one call after the
    other: a reserve is of one batch and cannot be parted, and gradients of the weights are sums over one.  Of vmap over
    sequences alone the calls see nothing: they are then of a larger batch, see `maps_into_batch`.

    Fields:
      mode: cuDNN's number of the cell.
      directions: 1, or 2 for forward and backward side by side.
      precision: of products, one of `algorithm.TF32_ALLOWED`.
    """

    mode: int
    directions: int
    precision: str | None

    def forward(self, given: Inputs, keep: bool) -> Outputs:
        """The run; without `keep` the reserve is empty."""

        def call(groups: int, *arrays: Array) -> tuple[Array, ...]:
            given = Inputs(*arrays)
            kind = self._kind(given, True)
            sizes = library().sizes(kind)
            results = [
                ((kind.steps, kind.batch, kind.directions * kind.hidden), given.x.dtype),
                (given.h.shape, given.h.dtype), (given.c.shape, given.c.dtype),
                # For each sequence as much as for any other, see `_Kept` in __init__.py.
                ((-(-sizes.reserve // kind.batch) * kind.batch if keep else 0,), jnp.uint8),
                ((sizes.training if keep else sizes.inference,), jnp.uint8),
            ]  # fmt: skip
            return self._call("forward", kind, results, arrays)[:4]

        if keep:
            return Outputs(*over_batch(call, [None] * 5, [None] * 4)(*given))
        return Outputs(*over_batch(call, (1, 1, 1, None, 0), (1, 1, 1, 0))(*given))

    def backward(
        self, given: Inputs, y: Array, reserve: Array, dy: Array, dh: Array, dc: Array, weights: bool
    ) -> tuple[Array, Array, Array, Array]:
        """The cotangents of x, h, c and, if they are asked for, the weights; from those of the outputs."""

        def call(groups: int, *arrays: Array) -> tuple[Array, ...]:
            given, reserve = Inputs(*arrays[: len(Inputs._fields)]), arrays[-1]
            kind = self._kind(given, False)
            # The library writes to the reserve, and adds the gradients of the weights to what is there.
            sums = jnp.zeros(given.weights.shape if weights else (0,), given.weights.dtype)
            results = [(a.shape, a.dtype) for a in (given.x, given.h, given.c, reserve, sums)]
            results += [((library().sizes(kind).training,), jnp.uint8)]
            dx, dh, dc, _, sums, _ = self._call("backward", kind, results, (*arrays, sums), {9: 3, 10: 4})
            return dx, dh, dc, sums

        return over_batch(call, [None] * 10, [None] * 4)(*given, y, dy, dh, dc, reserve)

    def _kind(self, given: Inputs, forward: bool) -> Kind:
        steps, batch, features = given.x.shape
        runs, _, hidden = given.h.shape
        dtype, layers = given.x.dtype.name, runs // self.directions
        chosen = algorithm.choose(
            algorithm.device(), self.mode, dtype, (steps, batch, features, hidden), layers, self.directions,
            given.lengths.size > 0, forward,
        )  # fmt: skip
        math, data = algorithm.math(dtype, self.precision), algorithm.DATA[dtype]
        return Kind(self.mode, chosen, math, data, self.directions, layers, steps, batch, features, hidden)

    def _call(
        self, handler: str, kind: Kind, results: list, arrays: tuple[Array, ...],
        aliases: dict[int, int] | None = None,
    ) -> tuple[Array, ...]:  # fmt: skip
        if CAPTURABLE and not Inputs(*arrays[:5]).lengths.size:
            handler = f"{handler}_capturable"
        return ffi.call(library().targets[handler], results, arrays, aliases, kind=np.array(kind, np.int64))
