"""The two calls that XLA makes, and what vmap does to them: mapped sequences become more of a batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from rnncore import _compat
from rnncore._types import Array
from rnncore.recurrence.batching import over_batch

PAD = 16
"""Units of a head are padded to a multiple of this in what the forward call keeps: kPad of sizes.h."""


class Moving(NamedTuple):
    """What the recurrence is differentiated with respect to.

    Fields:
      x: (B, T, D), or (T, B, D).
      input_kernel: (D, G, H).
      kernel: (N, H/N, G, H/N).
      bias: (G, H), with the recurrent bias of the gates that see z + r alone.
      rest_bias: (n, H), of r of the other gates.
      units: (P, H).
      start, target: (F, B, H), a carry as one array; no target without resets.
    """

    x: Array
    input_kernel: Array
    kernel: Array
    bias: Array
    rest_bias: Array
    units: Array
    start: Array
    target: Array


class Given(NamedTuple):
    """What it depends on besides; empty arrays where there is none: masks (B, H), lengths (B,), resets (T, B)."""

    mask: Array
    lengths: Array
    resets: Array


_SHARED = ("input_kernel", "kernel", "bias", "rest_bias", "units")
"""What all sequences share; its gradients are sums over them."""


class Calls:
    """The handlers of one compiled cell, for one dtype and one order of the axes.

    Args:
      targets: handler to its name, see `compiler.targets`.
      width: residuals of a step.
      dtype: of all floating arrays.
      time_major: whether x and y have time first.
    """

    def __init__(self, targets: dict[str, str], width: int, dtype: str, time_major: bool):
        self.targets, self.width, self.dtype, self.time_major = targets, width, dtype, time_major
        rows = 1 if time_major else 0
        shared = [None] * len(_SHARED)
        self._batch = (rows, *shared, 1, 1, 0, 0, 1)  # of Moving and Given
        self._outputs = (rows, 1, 1)

    def forward(self, moving: Moving, given: Given, keep: bool) -> tuple[Array, Array, Array]:
        """(y as x with H for D, last (F, B, H), kept (T, B, width, padded H), empty where it is not wanted)."""

        def run(groups: int, *args: Array) -> Any:
            del groups  # nothing is summed over sequences
            moving = Moving(*args[: len(Moving._fields)])
            heads, size = moving.kernel.shape[:2]
            steps, rows = moving.x.shape[:2] if self.time_major else moving.x.shape[1::-1]
            kept = (steps, rows, self.width, heads * -(-size // PAD) * PAD) if keep else (0,)
            shapes = ((*moving.x.shape[:2], heads * size), moving.start.shape, kept)
            return self._call("forward_keeping" if keep else "forward", shapes, args)

        return over_batch(run, self._batch, self._outputs)(*moving, *given)

    def backward(
        self, moving: Moving, given: Given, y: Array, kept: Array, dy: Array, dlast: Array, inputs: bool
    ) -> Moving:
        """The cotangents; that of x is empty unless `inputs`."""

        def run(groups: int, *args: Array) -> Any:
            moving = Moving(*args[: len(Moving._fields)])
            summed = {name: (groups, *getattr(moving, name).shape) for name in _SHARED}
            shapes: Any = Moving(*(a.shape for a in moving))._replace(**summed)  # type: ignore[arg-type]
            if not inputs:
                shapes = shapes._replace(x=(0,))
            return self._call("backward", shapes, args, groups=groups)

        batch, rows = self._batch, self._batch[0]
        out = over_batch(run, (*batch, rows, 1, rows, 1), batch[: len(Moving._fields)])(
            *moving, *given, y, kept, dy, dlast
        )
        return Moving(*(a[0] if axis is None else a for a, axis in zip(out, batch, strict=False)))

    def _call(self, handler: str, shapes: Any, args: tuple[Array, ...], **options: Any) -> tuple[Array, ...]:
        results = [jax.ShapeDtypeStruct(shape, self.dtype) for shape in shapes]
        call = jax.ffi.ffi_call(self.targets[handler], results)
        axes = _compat.varying_axes(args[0])
        return tuple(_compat.vary_over(a, axes) for a in call(*args, time_major=self.time_major, **options))
