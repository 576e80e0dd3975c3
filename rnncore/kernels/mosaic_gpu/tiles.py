"""What both Mosaic GPU kernels do with tiles: where they lie, and how they get to registers and back.

Arrays in global memory are (T, B, ...) with units last; a tile in shared memory is (sequences, units).  In registers it
is turned: its 64 rows are the units, as the matrix unit has them.
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
from rnncore.kernels.mosaic_gpu.plan import UNITS, Plan

Layout = plgpu.Layout
GROUP = "group"


class Tiles:
    """The part of one block: a head of a tile of sequences.  Made inside a kernel.

    Args:
      plan: the layout.
      dtype: of everything in shared memory.
      stage: staging tiles in shared memory, (n, sequences, units).
      loaded: the barrier of single loads.
    """

    def __init__(self, plan: Plan, dtype: Any, stage: Any, loaded: Any):
        self.plan, self.dtype, self.stage, self._loaded = plan, dtype, stage, loaded
        group = lax.axis_index(GROUP)
        self.head = lax.div(group, plan.tiles)
        self.sequences = pl.ds(lax.rem(group, plan.tiles) * plan.batch, plan.batch)

    def units(self, gate: int | None = 0) -> Any:
        """The head's units of a gate, in a slab (..., G*H); None where all units have the same."""
        if gate is None:
            return pl.ds(0, UNITS)
        return pl.ds((gate * self.plan.heads + self.head) * UNITS, UNITS)

    # -------------------------------------------------------------------------- registers

    def read(self, ref: Any) -> Array:
        """A tile of shared memory, in float32."""
        tile = _pallas.load(_pallas.transposed(ref), Layout.WGMMA_TRANSPOSED)
        return plgpu.layout_cast(tile, Layout.WGMMA).astype(jnp.float32)

    def write(self, ref: Any, tile: Array) -> None:
        """A tile to shared memory, rounded."""
        _pallas.transposed(ref)[...] = plgpu.layout_cast(tile.astype(self.dtype), Layout.WGMMA_TRANSPOSED)

    def zeros(self, count: int) -> tuple[Array, ...]:
        zero = jnp.zeros((UNITS, self.plan.batch), jnp.float32)
        return tuple(plgpu.layout_cast(zero, Layout.WGMMA) for _ in range(count))

    # --------------------------------------------------------------------- single loads and stores

    def load(self, source: Any, here: Any) -> None:
        """Part of a global array to shared memory, before the loop."""
        plgpu.copy_gmem_to_smem(source, here, self._loaded)
        plgpu.barrier_wait(self._loaded)

    def fetch(self, sources: Sequence[Any]) -> tuple[Array, ...]:
        """Tiles of (B, H) arrays, before the loop."""
        return tuple(map(self._fetched, sources))

    def _fetched(self, source: Any) -> Array:
        self.load(source.at[self.sequences, self.units()], self.stage.at[0])
        tile = self.read(self.stage.at[0])
        plgpu.commit_smem()  # read by all before the next load
        return tile

    def store(self, tiles: Sequence[Array], targets: Sequence[Any]) -> None:
        """Tiles to (B, H) arrays, after the loop."""
        plgpu.wait_smem_to_gmem(0)
        for n, tile in enumerate(tiles):
            self.write(self.stage.at[n], tile)
        plgpu.commit_smem()
        for n, target in enumerate(targets):
            plgpu.copy_smem_to_gmem(self.stage.at[n], target.at[self.sequences, self.units()])
        plgpu.wait_smem_to_gmem(0)


class Ring:
    """The inputs of the steps to come, a few steps ahead.

    Args:
      tiles: the block's.
      refs: shared memory (stages, n, sequences, units).
      barriers: one a stage.
      sources: (array (T, B, ...), gate) per tile of a step, as in `Tiles.units`.
      order: the number of a step in the loop -> the step.
      steps: T.
    """

    def __init__(
        self, tiles: Tiles, refs: Any, barriers: Any, sources: Sequence[tuple[Any, int | None]], order: Callable,
        steps: int,
    ):  # fmt: skip
        self._tiles, self._refs, self._barriers = tiles, refs, barriers
        self._sources, self._order, self._steps = sources, order, steps
        self.stages = refs.shape[0]
        for n in range(min(self.stages, steps)):
            self._issue(jnp.int32(n))

    def take(self, n: Array) -> list[Array]:
        """The tiles of the n-th step of the loop."""
        slot = lax.rem(n, self.stages)
        plgpu.barrier_wait(self._barriers.at[slot])
        return [self._tiles.read(self._refs.at[slot, k]) for k in range(len(self._sources))]

    def refill(self, n: Array) -> None:
        """Loads what comes in the place of the n-th step; after a `commit_smem` that follows its `take`."""

        @pl.when(n + self.stages < self._steps)
        def _() -> None:
            self._issue(n + self.stages)

    def _issue(self, n: Array) -> None:
        tiles, slot, t = self._tiles, lax.rem(n, self.stages), self._order(n)
        for k, (source, gate) in enumerate(self._sources):
            part = source.at[t, tiles.sequences, tiles.units(gate)]
            plgpu.copy_gmem_to_smem(part, self._refs.at[slot, k], self._barriers.at[slot])


def marked(flag: Array | None) -> tuple[Any, Any]:
    """(resets, ends) of a tile of flags, if there is one."""
    if flag is None:
        return None, None
    ends = flag > 1.5
    return flag - jnp.where(ends, 2.0, 0.0) > 0.5, ends
