"""What both Mosaic GPU kernels do with tiles: where they lie, and how they get to registers and back.

Arrays in global memory are (T, B, ...) with units last; a tile in shared memory is (sequences, units).  In
registers it has the 64 rows of the matrix unit: units, and then it is turned on its way, or sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from rnncore import _pallas
from rnncore._types import Array
from rnncore.kernels.mosaic_gpu.plan import Plan

Layout = plgpu.Layout
THREADS, GROUP = "warpgroup", "group"
PIECE = 256
"""Units that a product takes at once."""


class Tiles:
    """The part of one warpgroup of one block.  Made inside a kernel.

    Args:
      plan: the layout.
      dtype: of everything in shared memory.
      stage: staging tiles of all warpgroups in shared memory, (W, n, sequences, units).
      loaded: barriers, one a warpgroup, for single loads.
      met: the barrier at which the block's warpgroups meet.
    """

    def __init__(self, plan: Plan, dtype: Any, stage: Any, loaded: Any, met: Any):
        self.plan, self.dtype, self._stage, self._met = plan, dtype, stage, met
        self.thread = lax.axis_index(THREADS)
        group = lax.axis_index(GROUP)
        self.head, self.batch_tile = lax.div(group, plan.tiles), lax.rem(group, plan.tiles)
        self._loaded = loaded.at[self.thread]
        # This warpgroup's units among the block's.
        self.inside = pl.ds(0 if plan.groups == 1 else self.thread * plan.units, plan.units)
        self._first = (self.head * plan.groups + self.thread) * plan.units
        self.sequences = pl.ds(self.batch_tile * plan.batch, plan.batch)

    def units(self, gate: int | None = 0) -> Any:
        """This warpgroup's units of a gate, in a slab (..., G*H); None where all units have the same."""
        plan = self.plan
        if gate is None:
            return pl.ds(0, plan.units)
        return pl.ds(gate * plan.heads * plan.size + self._first, plan.units)

    def filled(self, ref: Any) -> Any:
        """Those lines of a tile in shared memory that hold sequences."""
        return ref if self.plan.batch == self.plan.lines else ref.at[pl.ds(0, self.plan.batch), :]

    # -------------------------------------------------------------------------- registers

    def read(self, ref: Any) -> Array:
        """A tile of shared memory, in float32."""
        if self.plan.rows == "batch":
            return _pallas.load(ref, Layout.WGMMA).astype(jnp.float32)
        tile = _pallas.load(_pallas.transposed(ref), Layout.WGMMA_TRANSPOSED)
        return plgpu.layout_cast(tile, Layout.WGMMA).astype(jnp.float32)

    def write(self, ref: Any, tile: Array) -> None:
        """A tile to shared memory, rounded."""
        tile = tile.astype(self.dtype)
        if self.plan.rows == "batch":
            ref[...] = tile
        else:
            _pallas.transposed(ref)[...] = plgpu.layout_cast(tile, Layout.WGMMA_TRANSPOSED)

    def zeros(self) -> Array:
        return plgpu.layout_cast(jnp.zeros(self.plan.tile, jnp.float32), Layout.WGMMA)

    def part(self, accumulated: Array, gate: int) -> Array:
        """The rows, or columns, of one gate."""
        plan = self.plan
        if plan.rows == "units":
            return lax.slice(accumulated, (gate * 64, 0), ((gate + 1) * 64, plan.batch))
        return lax.slice(accumulated, (0, gate * plan.units), (64, (gate + 1) * plan.units))

    # --------------------------------------------------------------------- single loads and stores

    def fetch(self, source: Any) -> Array:
        """A tile of a (B, H) array, before the loop."""
        here = self._stage.at[self.thread, 0]
        plgpu.copy_gmem_to_smem(source.at[self.sequences, self.units()], self.filled(here), self._loaded)
        plgpu.barrier_wait(self._loaded)
        tile = self.read(here)
        plgpu.commit_smem()  # read by all before the next load
        return tile

    def staged(self, n: int) -> Any:
        """The n-th staging tile."""
        return self._stage.at[self.thread, n]

    def store(self, tiles: Sequence[Array], targets: Sequence[Any]) -> None:
        """Tiles to (B, H) arrays, after the loop."""
        plgpu.wait_smem_to_gmem(0)
        for n, tile in enumerate(tiles):
            self.write(self.staged(n), tile)
        plgpu.commit_smem()
        for n, target in enumerate(targets):
            plgpu.copy_smem_to_gmem(self.filled(self.staged(n)), target.at[self.sequences, self.units()])
        plgpu.wait_smem_to_gmem(0)

    def meet(self) -> None:
        """Waits for the block's other warpgroups."""
        if self.plan.groups > 1:
            plgpu.barrier_arrive(self._met)
            plgpu.barrier_wait(self._met)


def multiply(total: Any, left: Any, right: Any, size: int) -> None:
    """total += left right^T, both (rows, size) in shared memory.

    In a loop over pieces: unrolled over a long row, the addresses of all pieces would fill the registers.
    """
    piece = next(n for n in (PIECE, 192, 128, 96, 64, 48, 32, 16) if size % n == 0)
    if size <= PIECE:
        plgpu.wgmma(total, left, _pallas.transposed(right))
        return

    @pl.loop(0, size // piece)
    def _(k: Array) -> None:
        columns = pl.ds(k * piece, piece)
        plgpu.wgmma(total, left.at[:, columns], _pallas.transposed(right.at[:, columns]))


class Ring:
    """The inputs of the steps to come, a few steps ahead.

    Args:
      tiles: this warpgroup's.
      refs: shared memory (W, stages, n, sequences, units).
      barriers: one a warpgroup and stage.
      sources: (array (T, B, ...), gate) per tile of a step, as in `Tiles.units`.
      order: the number of a step in the loop -> the step.
      steps: T.
    """

    def __init__(
        self,
        tiles: Tiles,
        refs: Any,
        barriers: Any,
        sources: Sequence[tuple[Any, int | None]],
        order: Callable,
        steps: int,
    ):
        self._tiles, self._refs, self._barriers = tiles, refs, barriers
        self._sources, self._order, self._steps = sources, order, steps
        self.stages = refs.shape[1]

    def start(self) -> None:
        """Loads the first steps."""
        for n in range(min(self.stages, self._steps)):
            self._issue(jnp.int32(n))

    def take(self, n: Array) -> list[Array]:
        """The tiles of the n-th step of the loop."""
        tiles, slot = self._tiles, lax.rem(n, self.stages)
        plgpu.barrier_wait(self._barriers.at[tiles.thread * self.stages + slot])
        return [tiles.read(self._refs.at[tiles.thread, slot, k]) for k in range(len(self._sources))]

    def refill(self, n: Array) -> None:
        """Loads what comes in the place of the n-th step; after a `commit_smem` that follows its `take`."""

        @pl.when(n + self.stages < self._steps)
        def _() -> None:
            self._issue(n + self.stages)

    def _issue(self, n: Array) -> None:
        tiles, slot, t = self._tiles, lax.rem(n, self.stages), self._order(n)
        for k, (source, gate) in enumerate(self._sources):
            here = tiles.filled(self._refs.at[tiles.thread, slot, k])
            barrier = self._barriers.at[tiles.thread * self.stages + slot]
            plgpu.copy_gmem_to_smem(source.at[t, tiles.sequences, tiles.units(gate)], here, barrier)


def flags(lengths: Array | None, resets: Array | None, steps: int, width: int) -> Array | None:
    """(T, B, width): 1 where a step begins with a reset, plus 2 where it is the last valid one; None for neither."""
    if lengths is None and resets is None:
        return None
    marks: Array = jnp.int32(0) if resets is None else resets.astype(jnp.int32)
    if lengths is not None:
        marks = marks + 2 * (jnp.arange(steps)[:, None] == lengths - 1)
    return jnp.broadcast_to(marks[..., None], (*marks.shape, width))


def marked(flag: Array | None) -> tuple[Any, Any]:
    """(resets, ends) of a tile of flags, if there is one."""
    if flag is None:
        return None, None
    ends = flag > 1.5
    return flag - jnp.where(ends, 2.0, 0.0) > 0.5, ends
