"""The forward kernel: U stays in shared memory, and the loop over time runs inside.

A step multiplies U by h, adds the projected inputs (loaded some steps ahead), evaluates the cell in registers, in
float32, and writes the rounded h to shared memory for the next product.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from rnncore import _pallas
from rnncore._types import Array
from rnncore.kernels.host import Outputs
from rnncore.kernels.kernel_body import Body
from rnncore.kernels.mosaic_gpu.launch import Scratch, allocate, call
from rnncore.kernels.mosaic_gpu.plan import SLOTS, UNITS, Plan
from rnncore.kernels.mosaic_gpu.tiles import Ring, Tiles, marked


class Arrays(NamedTuple):
    """What the forward kernel reads, in global memory, all of one 16-bit dtype.

    Fields:
      z: (T, B, G*H).
      kernel: (N, G*64, 64), a row for each pre-activation of a head.
      start, reset_carry: (B, H) per field of the carry; `reset_carry` empty without resets.
      reset_r: (B, G*H), the recurrent product of the reset's h; None without resets.
      units, rest_bias: (B, H) per parameter.
      flags: (T, B, units), see `kernels._flags`; None for none.
    """

    z: Any
    kernel: Any
    start: tuple
    reset_carry: tuple
    reset_r: Any
    units: tuple
    rest_bias: tuple
    flags: Any


def run(plan: Plan, body: Body, arrays: Arrays, keep: bool, lengths: bool, interpret: bool, types: Any) -> Outputs:
    """Runs the kernel; `types` makes an output type of a shape.  Its results are all of the one dtype."""
    (steps, rows, _), hidden, dtype, fields = arrays.z.shape, plan.heads * UNITS, arrays.z.dtype, len(arrays.start)
    line, state = types((steps, rows, hidden)), types((rows, hidden))
    out = Outputs(line, (line,) * (fields - 1) * keep, (state,) * fields)
    memory = allocate(
        plan, dtype, plan.stages[0], plan.gates + (arrays.flags is not None), fields,
        h=(SLOTS,), reset_r=arrays.reset_r is not None,
    )  # fmt: skip
    return call(plan, _kernel(plan, body, dtype, steps, keep, lengths), arrays, out, memory, interpret)


def _kernel(plan: Plan, body: Body, dtype: Any, steps: int, keep: bool, lengths: bool) -> Any:
    def kernel(arrays: Arrays, results: Any, scratch: Scratch) -> None:
        tiles = Tiles(plan, dtype, scratch.stage, scratch.loaded)
        tiles.load(arrays.kernel.at[tiles.head], scratch.kernel)
        if arrays.reset_r is not None:
            for gate in range(plan.gates):
                tiles.load(arrays.reset_r.at[tiles.sequences, tiles.units(gate)], scratch.reset_r.at[gate])
        start, reset_carry, units, bias = map(
            tiles.fetch, (arrays.start, arrays.reset_carry, arrays.units, arrays.rest_bias)
        )
        bias_of = dict(zip(body.rest, bias, strict=True))
        sources: list[tuple[Any, int | None]] = [(arrays.z, gate) for gate in range(plan.gates)]
        sources += [(arrays.flags, None)] if arrays.flags is not None else []
        ring = Ring(tiles, scratch.inputs, scratch.input_barriers, sources, lambda n: n, steps)
        tiles.write(scratch.h.at[0], start[body.hidden])
        plgpu.commit_smem()

        def step(t: Array, state: Any) -> Any:
            carry, last = state

            def product(total: Any) -> tuple[list[Array], Array]:
                plgpu.wgmma(total, scratch.kernel, _pallas.transposed(scratch.h.at[lax.rem(t, SLOTS)]))
                return ring.take(t), total[...]  # load the inputs while the matrix unit works

            given, r = pl.run_scoped(product, plgpu.ACC((plan.gates * UNITS, plan.batch), jnp.float32))
            rs = [lax.slice(r, (g * UNITS, 0), ((g + 1) * UNITS, plan.batch)) for g in range(plan.gates)]
            resets, ends = marked(given[-1] if arrays.flags is not None else None)
            if arrays.reset_r is not None:
                # U h is linear, so that a reset may select after the product.
                rs = [jnp.where(resets, tiles.read(scratch.reset_r.at[g]), a) for g, a in enumerate(rs)]
                carry = tuple(jnp.where(resets, a, b) for a, b in zip(reset_carry, carry, strict=True))
            rs = [a + bias_of[gate] if gate in bias_of else a for gate, a in enumerate(rs)]
            carry = body.forward(units, tuple(given[: plan.gates]), tuple(rs), carry)
            if lengths:
                last = tuple(jnp.where(ends, a, b) for a, b in zip(carry, last, strict=True))
            publish(t, carry)
            return carry, last

        def publish(t: Array, carry: Any) -> None:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            here = scratch.h.at[lax.rem(t + 1, SLOTS)]
            tiles.write(here, carry[body.hidden])
            plgpu.commit_smem()
            # h first: it is the only value that the next step waits for.
            plgpu.copy_smem_to_gmem(here, results.hs.at[t, tiles.sequences, tiles.units()])
            ring.refill(t)
            others = [a for n, a in enumerate(carry) if n != body.hidden] if keep else []
            for n, a in enumerate(others):
                tiles.write(scratch.stage.at[n + 1], a)
            if others:
                plgpu.commit_smem()
            for n, stack in enumerate(results.others):
                plgpu.copy_smem_to_gmem(scratch.stage.at[n + 1], stack.at[t, tiles.sequences, tiles.units()])

        carry, last = lax.fori_loop(0, steps, step, (start, start if lengths else ()))
        tiles.store(last if lengths else carry, results.last)

    return kernel
