"""The two calls that XLA makes, and what vmap does to them: mapped sequences become more of a batch."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from rnncore._types import Array
from rnncore.cells.base import GatedCell
from rnncore.kernels import ffi
from rnncore.kernels.cpp import handlers
from rnncore.kernels.cpp.emit import Variant, body, described, plan, source
from rnncore.recurrence.batching import over_batch

PAD = 16
"""Units of a head are padded to a multiple of this in what the forward call keeps: kPad of sizes.h."""


class Differentiable(NamedTuple):
    """What the recurrence is differentiated with respect to.

    Fields:
      x: (B, T, D), or (T, B, D).
      input_kernel: (D, G, H).
      kernel: (N, H/N, G, H/N), (G, H) of a diagonal recurrence, or (r, G, H) of one of rank r.
      readouts: (r, H), what that reads of h; (0, H) of others.
      bias: (G, H), with the recurrent bias of the gates that see z + r alone.
      rest_bias: (n, H), of r of the other gates.
      units: (P, H).
      start, reset_carry: (F, B, H), a carry as one array; no reset_carry without resets.
    """

    x: Array
    input_kernel: Array
    kernel: Array
    readouts: Array
    bias: Array
    rest_bias: Array
    units: Array
    start: Array
    reset_carry: Array


class Constants(NamedTuple):
    """What it depends on besides; empty arrays where there is none.

    Fields:
      mask: (B, H), multiplies h where it enters the product.
      lengths: (B,), from 0 to T.
      resets: (T, B).
      share: (F,), what of each field of the old carry stays at every step.
      chosen: (n, T, B, H), which units of a field stay, for the n fields that have such booleans.
      shares: (m, T, B, H), likewise shares.
    """

    mask: Array
    lengths: Array
    resets: Array
    share: Array
    chosen: Array
    shares: Array


class Out(NamedTuple):
    """What a run gives.

    Fields:
      y: as x, with H for D.
      last: (F, B, H).
      states: (F - 1 + gates, T, B, H), the carry's fields but h, and the gates; empty where nobody wants them.
    """

    y: Array
    last: Array
    states: Array


_SHARED = ("input_kernel", "kernel", "readouts", "bias", "rest_bias", "units")
"""What all sequences share; its gradients are sums over them."""

NONE, SHARE, CHOSEN, SHARES = range(4)
"""What of a field of the carry stays: `Zoneout::Kind` of layout.h."""


@dataclasses.dataclass(frozen=True)
class Calls:
    """The handlers of one compiled cell.

    Fields:
      cell: as it is compiled.
      variant: the types of the arrays, and whether there are states.
      time_major: whether x and y have time first.
      zoneout: NONE, SHARE, CHOSEN or SHARES for each field of the carry.
      chunk_size: of every so many steps `begins` fields of the carry are kept.
      rematerialize: whether the steps between are run again.
    """

    cell: GatedCell
    variant: Variant
    time_major: bool
    zoneout: tuple[int, ...]
    chunk_size: int
    rematerialize: bool

    @property
    def begins(self) -> int:
        """Fields of the carry that are formed again between those steps; all of them where the steps are run again."""
        return len(self.cell.Carry._fields if self.rematerialize else plan(self.cell, self.variant).reformed)

    @property
    def _axes(self) -> tuple[tuple, tuple]:
        """Where the batch lies in Differentiable and Constants, and in Out; None: shared."""
        rows = 1 if self.time_major else 0
        return (rows, *[None] * len(_SHARED), 1, 1, 0, 0, 1, None, 2, 2), (rows, 1, 2)

    def _shape(self, arrays: Differentiable) -> tuple[int, int, int]:
        """(T, B, H)"""
        steps, rows = arrays.x.shape[:2] if self.time_major else arrays.x.shape[1::-1]
        return steps, rows, arrays.bias.shape[-1]

    def forward(
        self, differentiable: Differentiable, constants: Constants, keep: bool
    ) -> tuple[Out, tuple[Array, Array]]:
        """(results, what `backward` needs: empty unless it is wanted).

        That is (T, B, width, padded H), and the carry of some steps (T / chunk_size, B, begins, padded H).
        """

        width, fields = len(plan(self.cell, self.variant).kept), len(self.cell.Carry._fields)
        emitted = body(self.cell, self.variant).emitted

        def run(groups: int, *args: Array) -> Any:
            arrays = Differentiable(*args[: len(Differentiable._fields)])
            steps, rows, hidden = self._shape(arrays)
            heads = arrays.kernel.shape[0] if arrays.kernel.ndim > 3 else 1
            padded = heads * -(-(hidden // heads) // PAD) * PAD
            kept: tuple[int, ...] = (steps, rows, width, padded) if keep and not self.rematerialize else (0,)
            begins: tuple[int, ...] = (0,)
            if keep and self.begins:
                begins = (-(-steps // self.chunk_size), rows, self.begins, padded)
            states = (fields - 1 + emitted, steps, rows, hidden) if self.variant.states else (0,)
            real, stored, residual, _ = self.variant
            y = (*arrays.x.shape[:2], hidden)
            shapes = (y, stored), (arrays.start.shape, real), (kept, residual), (begins, real), (states, stored)
            return self._call("forward_keeping" if keep else "forward", rows, 1, shapes, args)

        inputs, (y, last, states) = self._axes
        found = over_batch(run, inputs, (y, last, 1, 1, states))(*differentiable, *constants)
        return Out(found[0], found[1], found[4]), found[2:4]

    def backward(
        self,
        differentiable: Differentiable,
        constants: Constants,
        y: Array,
        residuals: tuple[Array, Array],
        dout: Out,
        inputs: bool,
    ) -> Differentiable:
        """The cotangents, empty ones of `dout` counting as zero; that of x is empty unless `inputs`."""

        def run(groups: int, *args: Array) -> Any:
            arrays = Differentiable(*args[: len(Differentiable._fields)])
            summed = {name: (groups, *getattr(arrays, name).shape) for name in _SHARED}
            shapes: Any = Differentiable(*(a.shape for a in arrays))._replace(**summed)  # type: ignore[arg-type]
            if not inputs:
                shapes = shapes._replace(x=(0,))
            types = [self.variant.stored, *[self.variant.real] * (len(shapes) - 1)]
            return self._call("backward", self._shape(arrays)[1], groups, tuple(zip(shapes, types, strict=True)), args)

        batch, (rows, last, states) = self._axes
        found = over_batch(run, (*batch, rows, 1, 1, rows, last, states), batch[: len(Differentiable._fields)])(
            *differentiable, *constants, y, *residuals, *dout
        )
        return Differentiable(*(a[0] if axis is None else a for a, axis in zip(found, batch, strict=False)))

    def _call(self, handler: str, rows: int, groups: int, shapes: Any, args: tuple[Array, ...]) -> tuple[Array, ...]:
        if not rows:
            return tuple(jnp.zeros(*one) for one in shapes)
        targets = handlers.targets(source(self.cell, self.variant), described(self.cell, self.variant))
        return ffi.call(
            targets[handler], shapes, args, time_major=self.time_major, groups=groups, every=self.chunk_size,
            again=self.rematerialize, zoneout=np.asarray(self.zoneout, np.int64),
        )  # fmt: skip
