"""The backward kernel: the transposed linearised step, from the last step to the first, with U in shared memory.

A step evaluates the cell's vjp in registers, on residuals that were computed for all steps outside the kernel.  It
rounds the cotangents of the recurrent products, which are results too, and multiplies those of all gates by U^T.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from rnncore import _pallas
from rnncore._types import Array
from rnncore.kernels.host import Cotangents
from rnncore.kernels.kernel_body import Body
from rnncore.kernels.mosaic_gpu.launch import Scratch, allocate, call
from rnncore.kernels.mosaic_gpu.plan import SLOTS, UNITS, Plan
from rnncore.kernels.mosaic_gpu.tiles import Ring, Tiles, marked


class Arrays(NamedTuple):
    """What the backward kernel reads, in global memory, all of one 16-bit dtype.

    Fields:
      residuals: each (T, B, H).
      dhs: (T, B, H).
      dlast: (B, H) per field of the carry.
      kernel: (N, G*64, 64): of U[d_in, g, d_out] the rows d_in, gate by gate.
      units: (B, H) per parameter.
      flags: (T, B, units), see `kernels._flags`; None for none.
    """

    residuals: tuple
    dhs: Any
    dlast: tuple
    kernel: Any
    units: tuple
    flags: Any


def run(plan: Plan, body: Body, arrays: Arrays, lengths: bool, resets: bool, interpret: bool, types: Any) -> Cotangents:
    """Runs the kernel; `types` makes an output type of a shape.  Its results are all of the one dtype."""
    steps, rows, hidden = arrays.dhs.shape
    dtype, count, fields = arrays.dhs.dtype, len(body.rest), len(arrays.dlast)
    state = types((rows, hidden))
    out = Cotangents(
        z=types((steps, rows, plan.gates * hidden)),
        rest=types((steps, rows, count * hidden)) if count else None,
        start=(state,) * fields,
        reset_carry=(state,) * fields if resets else None,
        units=(state,) * len(arrays.units),
    )
    memory = allocate(
        plan, dtype, plan.stages[1], len(arrays.residuals) + 1 + (arrays.flags is not None), max(count, fields),
        h=(SLOTS, plan.gates),
    )  # fmt: skip
    return call(plan, _kernel(plan, body, dtype, steps, lengths, resets), arrays, out, memory, interpret)


def _kernel(plan: Plan, body: Body, dtype: Any, steps: int, lengths: bool, resets: bool) -> Any:
    apart = {gate: n for n, gate in enumerate(body.rest)}

    def kernel(arrays: Arrays, results: Cotangents, scratch: Scratch) -> None:
        tiles = Tiles(plan, dtype, scratch.stage, scratch.loaded)
        tiles.load(arrays.kernel.at[tiles.head], scratch.kernel)
        units, dlast = tiles.fetch(arrays.units), tiles.fetch(arrays.dlast)
        sources: list[tuple[Any, int | None]] = [(a, 0) for a in (*arrays.residuals, arrays.dhs)]
        sources += [(arrays.flags, None)] if arrays.flags is not None else []
        ring = Ring(tiles, scratch.inputs, scratch.input_barriers, sources, lambda n: steps - 1 - n, steps)
        count = len(arrays.residuals)

        def step(n: Array, state: Any) -> Any:
            ds, dreset_carry, dunits = state
            given = ring.take(n)
            reset, ends = marked(given[-1] if arrays.flags is not None else None)
            if lengths:
                ds = tuple(a + jnp.where(ends, b, 0.0) for a, b in zip(ds, dlast, strict=True))
            ds = tuple(a + given[count] if n == body.hidden else a for n, a in enumerate(ds))
            more, dzs, drest, ds = body.backward(units, tuple(given[:count]), ds)
            dunits = tuple(a + b for a, b in zip(dunits, more, strict=True))
            dh = across(n, dzs, drest)
            ds = tuple(a + dh if n == body.hidden else a for n, a in enumerate(ds))
            if resets:
                dreset_carry = tuple(a + jnp.where(reset, b, 0.0) for a, b in zip(dreset_carry, ds, strict=True))
                ds = tuple(jnp.where(reset, 0.0, a) for a in ds)
            return ds, dreset_carry, dunits

        def across(n: Array, dzs: Any, drest: Any) -> Array:
            """Gives the cotangents to the results; dr U^T."""
            dr, t = scratch.h.at[lax.rem(n, SLOTS)], steps - 1 - n
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            # What the product waits for first: the cotangents of the recurrent products.
            outgoing = []  # (where it is staged, result, gate of it)
            for gate, dz in enumerate(dzs):
                tiles.write(dr.at[gate], drest[apart[gate]] if gate in apart else dz)
                to = (results.rest, apart[gate]) if gate in apart else (results.z, gate)
                outgoing.append((dr.at[gate], *to))
            plgpu.commit_smem()
            give(t, outgoing)
            ring.refill(n)
            if apart:
                staged = [(scratch.stage.at[own], results.z, gate) for gate, own in apart.items()]
                for here, _, gate in staged:
                    tiles.write(here, dzs[gate])
                plgpu.commit_smem()
                give(t, staged)

            def product(total: Any) -> Array:
                for gate in range(plan.gates):
                    weights = scratch.kernel.at[pl.ds(gate * UNITS, UNITS), :]
                    plgpu.wgmma(total, weights, _pallas.transposed(dr.at[gate]))
                return total[...]

            return pl.run_scoped(product, plgpu.ACC((UNITS, plan.batch), jnp.float32))

        def give(t: Array, outgoing: Any) -> None:
            """Staged tiles to the results."""
            for here, target, gate in outgoing:
                plgpu.copy_smem_to_gmem(here, target.at[t, tiles.sequences, tiles.units(gate)])

        start = tiles.zeros(len(dlast)) if lengths else dlast
        ds, dreset_carry, dunits = lax.fori_loop(
            0, steps, step, (start, tiles.zeros(len(dlast) * resets), tiles.zeros(len(arrays.units)))
        )
        tiles.store(ds, results.start)
        if results.reset_carry is not None:
            tiles.store(dreset_carry, results.reset_carry)
        for tile, target in zip(dunits, results.units, strict=True):
            tiles.store([tile], [target])

    return kernel
