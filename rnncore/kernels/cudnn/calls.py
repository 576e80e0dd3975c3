"""The two calls: layers and directions over a batch of sequences, forward, and back from what forward kept."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rnncore import _compat
from rnncore._types import Array
from rnncore.kernels.cudnn import algorithm
from rnncore.kernels.cudnn.library import Kind, Library, library


class Inputs(NamedTuple):
    """What the library gets.

    Fields:
      x: (T, B, D).
      h, c: (layers * directions, B, H); c is (0, B, H) but for an LSTM.
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

    Fields:
      mode: cuDNN's number of the cell.
      directions: 1, or 2 for forward and backward side by side.
      precision: of products, one of `algorithm.TF32_ALLOWED`.
    """

    mode: int
    directions: int
    precision: str | None

    def forward(self, given: Inputs, keep: bool) -> Outputs:
        """The run; without `keep` there is no reserve."""
        calls, kind = library(), self._kind(given, True)
        sizes = calls.sizes(kind)
        shapes = [
            ((kind.steps, kind.batch, kind.directions * kind.hidden), given.x.dtype),
            (given.h.shape, given.h.dtype), (given.c.shape, given.c.dtype),
            ((sizes.reserve if keep else 0,), jnp.uint8), ((sizes.training if keep else sizes.inference,), jnp.uint8),
        ]  # fmt: skip
        return Outputs(*self._call(calls, "forward", kind, shapes, given)[:4])

    def backward(self, given: Inputs, y: Array, reserve: Array, dy: Array, dh: Array, dc: Array) -> Inputs:
        """The cotangents of the inputs, those of lengths without meaning, from those of the outputs."""
        calls, kind = library(), self._kind(given, False)
        shapes = [(a.shape, a.dtype) for a in (given.x, given.h, given.c, reserve, given.weights)]
        shapes += [((calls.sizes(kind).training,), jnp.uint8)]
        # The library writes to the reserve, and adds the gradients of the weights to what is there.
        operands = (*given, y, dy, dh, dc, reserve, jnp.zeros_like(given.weights))
        found = self._call(calls, "backward", kind, shapes, operands, {9: 3, 10: 4})
        return Inputs(*found[:3], found[4], given.lengths)

    def _kind(self, given: Inputs, forward: bool) -> Kind:
        steps, batch, features = given.x.shape
        runs, _, hidden = given.h.shape
        dtype, layers, lengths = given.x.dtype.name, runs // self.directions, bool(given.lengths.size)
        chosen = algorithm.choose(
            algorithm.device(), self.mode, dtype, (steps, batch, features, hidden), layers, self.directions, lengths,
            forward,
        )  # fmt: skip
        math = algorithm.math(dtype, self.precision)
        data = algorithm.DATA[dtype]
        return Kind(self.mode, chosen, math, data, self.directions, layers, steps, batch, features, hidden)

    def _call(
        self, calls: Library, handler: str, kind: Kind, shapes: list, operands: tuple[Array, ...],
        aliases: dict[int, int] | None = None,
    ) -> tuple[Array, ...]:  # fmt: skip
        # With full lengths nothing waits for the host, and a CUDA graph may hold the call.
        name = handler if operands[4].size else f"{handler}_capturable"
        results = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
        call = jax.ffi.ffi_call(calls.targets[name], results, input_output_aliases=aliases)
        axes = frozenset().union(*map(_compat.varying_axes, operands))
        operands = tuple(_compat.vary_over(a, axes) for a in operands)
        numbers = {name: np.int64(getattr(kind, name)) for name in ("mode", "algorithm", "math")}
        return tuple(_compat.vary_over(a, axes) for a in call(*operands, **numbers))
