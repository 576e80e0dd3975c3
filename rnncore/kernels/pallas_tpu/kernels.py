"""Backend "pallas_tpu": the two kernels.

The grid is (tiles of the batch, blocks of time).  Blocks of time run in order, so what a kernel holds in VMEM lasts
from one to the next: the recurrent kernel, and the carry or its cotangent in float32.  The grid itself fetches stacks
one block ahead and writes them one block behind.  Padded steps are not run, padded rows do not mix with others, and
padded units are kept out of the products.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rnncore import _compat
from rnncore._types import Array
from rnncore.cells.base import PointwiseCell
from rnncore.kernels import host, kernel_body
from rnncore.kernels.pallas_tpu import plan as plans
from rnncore.kernels.pallas_tpu.plan import Plan

ONE_PASS = (None, "default", "DEFAULT", "fastest", "bfloat16", "BF16_BF16_F32")
"""Values of `jax.default_matmul_precision` that round to bfloat16; what asks for more gets float32, not less."""


class Inputs(NamedTuple):
    """What a kernel reads, padded and in the layout of its plan; None where there is no such thing.

    Fields:
      stacks: (T, B, n*H) each.
      kernel: (blocks, width, G*width), in the backward kernel (blocks, G*width, width).
      bias, units: (1, H) each.
      ends: (B, H) each: the carry before the first step, or the cotangent of the one after the last.
      reset_carry: (B, H) each.
      lengths: (B, 1) int32.
      resets: (blocks of time, B, 1) int32, a bit for each step of the block.
    """

    stacks: tuple
    kernel: Any
    bias: tuple
    units: tuple
    ends: tuple
    reset_carry: tuple
    lengths: Any
    resets: Any


def kernels(interpret: bool = False) -> host.Kernels:
    """The two kernels; interpreted they run on any platform, slowly."""
    return host.Kernels(functools.partial(_forward, interpret), functools.partial(_backward, interpret))


# -------------------------------------------------------------------------------------- the kernels


def _forward_kernel(
    cell: PointwiseCell, plan: Plan, total: int, precision: Any, inputs: Inputs, hs: Any, others: Any, last: Any,
    carry: Any,
) -> None:  # fmt: skip
    part, gates, units = kernel_body.of(cell, (plan.rows, plan.units)), len(cell.gates), plan.units
    block = pl.program_id(1)

    @pl.when(block == 0)
    def _() -> None:
        for ref, end, a in zip(carry, last, inputs.ends, strict=True):
            ref[...] = a[...].astype(jnp.float32)
            end[...] = ref[...]  # for sequences of length 0

    def step(t: Any, _: None) -> None:
        old = [ref[...] for ref in carry]
        if inputs.resets is not None:
            here = _bit(plan, inputs.resets, t)
            old = [jnp.where(here, a[...].astype(jnp.float32), b) for a, b in zip(inputs.reset_carry, old, strict=True)]
        zs = [inputs.stacks[0][t, :, g * units : (g + 1) * units].astype(jnp.float32) for g in range(gates)]
        rs = _recurrent_matmul(plan, gates, old[part.hidden], inputs.kernel, precision)
        for g, bias in zip(part.rest, inputs.bias, strict=True):
            rs[g] = rs[g] + bias[...]
        new = part.forward(_spread_rows(plan, inputs.units), tuple(zs), tuple(rs), tuple(old))
        for ref, a in zip(carry, new, strict=True):
            ref[...] = a
        hs[t] = new[part.hidden].astype(hs.dtype)
        for ref, a in zip(others, [a for n, a in enumerate(new) if n != part.hidden] if others else [], strict=True):
            ref[t] = a.astype(ref.dtype)
        if inputs.lengths is not None:
            here = _is_last(plan, inputs.lengths, block, t)
            for ref, a in zip(last, new, strict=True):
                ref[...] = jnp.where(here, a, ref[...])

    lax.fori_loop(np.int32(0), _run_here(plan, total, block), step, None)
    if inputs.lengths is None:

        @pl.when(block == plan.spans - 1)
        def _() -> None:
            for ref, a in zip(last, carry, strict=True):
                ref[...] = a[...]


def _backward_kernel(
    cell: PointwiseCell, plan: Plan, total: int, precision: Any, inputs: Inputs, dz: Any, drest: Any, dstart: Any,
    dreset_carry: Any, dunits: Any, dcarry: Any,
) -> None:  # fmt: skip
    part, units = kernel_body.of(cell, (plan.rows, plan.units)), plan.units
    first, block = pl.program_id(1) == 0, plan.spans - 1 - pl.program_id(1)
    steps = _run_here(plan, total, block)
    *residuals, dhs = inputs.stacks

    @pl.when(first)
    def _() -> None:
        for ref, a in zip(dcarry, inputs.ends, strict=True):
            ref[...] = a[...] if inputs.lengths is None else jnp.zeros_like(a)
        for ref in (*(dreset_carry or ()), *dunits):
            ref[...] = jnp.zeros_like(ref)

    def step(n: Any, _: None) -> None:
        t = steps - 1 - n
        ds = [ref[...] for ref in dcarry]
        if inputs.lengths is not None:
            here = _is_last(plan, inputs.lengths, block, t)
            ds = [a + jnp.where(here, b[...], 0.0) for a, b in zip(ds, inputs.ends, strict=True)]
        ds[part.hidden] = ds[part.hidden] + dhs[t].astype(jnp.float32)
        saved = tuple(a[t].astype(jnp.float32) for a in residuals)
        du, dzs, dapart, dold = part.backward(_spread_rows(plan, inputs.units), saved, tuple(ds))
        for ref, a in zip(dunits, du, strict=True):
            ref[...] += a
        for out, slab in ((dz, dzs), (drest, dapart)):
            for g, a in enumerate(slab):
                out[t, :, g * units : (g + 1) * units] = a.astype(out.dtype)
        apart = iter(dapart)
        drs = [a if alone else next(apart) for a, alone in zip(dzs, part.additive, strict=True)]
        old = list(dold)
        old[part.hidden] = old[part.hidden] + _transposed_matmul(plan, drs, inputs.kernel, precision, dhs.dtype)
        if inputs.resets is not None:
            here = _bit(plan, inputs.resets, t)
            for ref, a in zip(dreset_carry, old, strict=True):
                ref[...] += jnp.where(here, a, 0.0)
            old = [jnp.where(here, 0.0, a) for a in old]
        for ref, a in zip(dcarry, old, strict=True):
            ref[...] = a

    lax.fori_loop(np.int32(0), steps, step, None)

    @pl.when(block == 0)
    def _() -> None:
        for ref, a in zip(dstart, dcarry, strict=True):
            ref[...] = a[...]


def _run_here(plan: Plan, total: int, block: Any) -> Any:
    """How many steps of a block there are.  A traced number: loops of a static one count in 64 bits under x64."""
    return jnp.minimum(np.int32(plan.steps), np.int32(total) - block * np.int32(plan.steps))


def _recurrent_matmul(plan: Plan, gates: int, h: Array, kernel: Any, precision: Any) -> list[Array]:
    """r of every gate: h, rounded to the kernel's dtype, times the kernel."""
    parts = [_dot(_piece(plan, h, n).astype(kernel.dtype), kernel[n], precision) for n in range(plan.blocks)]
    return [_side_by_side([_lanes(a, g, plan.width) for a in parts]) for g in range(gates)]


def _transposed_matmul(plan: Plan, drs: Sequence[Array], kernel: Any, precision: Any, dtype: Any) -> Array:
    """dh of dr of every gate, which is rounded likewise."""
    sides = [_side_by_side([_piece(plan, dr, n) for dr in drs]).astype(dtype) for n in range(plan.blocks)]
    return _side_by_side([_dot(side, kernel[n], precision) for n, side in enumerate(sides)])


def _dot(a: Array, b: Array, precision: Any) -> Array:
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _piece(plan: Plan, a: Array, n: int) -> Array:
    """What the n-th block of the kernel multiplies; a padded unit may have become NaN, which 0 does not undo."""
    piece = _lanes(a, n, plan.width)
    if plan.real == plan.width:
        return piece
    return jnp.where(lax.broadcasted_iota(jnp.int32, piece.shape, 1) < plan.real, piece, 0.0)


def _lanes(a: Array, n: int, width: int) -> Array:
    return lax.slice_in_dim(a, n * width, (n + 1) * width, axis=1)


def _side_by_side(pieces: Sequence[Array]) -> Array:
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, 1)


def _spread_rows(plan: Plan, refs: Sequence[Any]) -> tuple[Array, ...]:
    return tuple(jnp.broadcast_to(ref[...], (plan.rows, plan.units)) for ref in refs)


def _bit(plan: Plan, words: Any, t: Any) -> Array:
    """Whether step t of this block is marked, for every row and unit."""
    bits = jnp.broadcast_to(words[0], (plan.rows, plan.units))
    return lax.bitwise_and(lax.shift_right_logical(bits, jnp.full_like(bits, t)), jnp.full_like(bits, 1)) != 0


def _is_last(plan: Plan, lengths: Any, block: Any, t: Any) -> Array:
    """Whether step t of this block is the last valid one, for every row and unit."""
    return jnp.broadcast_to(lengths[...], (plan.rows, plan.units)) == block * np.int32(plan.steps) + t + 1


# -------------------------------------------------------------------------------------- the calls


def _forward(interpret: bool, cell: PointwiseCell, loop: host.Loop, z: Array, keep: str | None) -> host.Outputs:
    (steps, rows, _), fields = z.shape, len(cell.Carry._fields)
    plan = plans.forward(cell, steps, rows, z.dtype, keep)
    stack, row = _results(plan, z)
    inputs = _inputs(plan, loop, (_stack(plan, z, cell.hidden_size),), _matrix(plan, loop.kernel), loop.start)
    results = host.Outputs(
        hs=stack(1, z.dtype), others=() if keep is None else (stack(1, keep),) * (fields - 1), last=(row,) * fields
    )
    kernel = functools.partial(_forward_kernel, cell, plan, steps, _precision(z.dtype))
    out = _call(kernel, plan, inputs, results, False, interpret)
    return jax.tree.map(functools.partial(_cut, plan, (steps, rows, cell.hidden_size)), out)


def _backward(
    interpret: bool, cell: PointwiseCell, loop: host.Loop, residuals: tuple[Array, ...], dhs: Array,
    dlast: tuple[Array, ...],
) -> host.Cotangents:  # fmt: skip
    (steps, rows, hidden), fields = dhs.shape, len(dlast)
    stored = residuals[0].dtype if residuals else dhs.dtype
    rest = len(kernel_body.of(cell, (1, 1)).rest)
    plan = plans.backward(cell, steps, rows, dhs.dtype, stored)
    stack, row = _results(plan, dhs)
    stacks = tuple(_stack(plan, a, hidden) for a in (*residuals, dhs))
    matrix = jnp.swapaxes(_matrix(plan, loop.kernel), 1, 2)
    # What was added, and what a reset returned to, is nothing to the derivative.
    inputs = _inputs(plan, loop._replace(rest_bias=None, reset_carry=None), stacks, matrix, dlast)
    results = host.Cotangents(
        z=stack(len(cell.gates), stored),
        rest=stack(rest, stored) if rest else None,
        start=(row,) * fields,
        reset_carry=None if loop.resets is None else (row,) * fields,
        units=(row,) * len(cell.units),
    )
    kernel = functools.partial(_backward_kernel, cell, plan, steps, _precision(dhs.dtype))
    out = _call(kernel, plan, inputs, results, True, interpret)
    return jax.tree.map(functools.partial(_cut, plan, (steps, rows, hidden)), out)


def _call(kernel: Any, plan: Plan, inputs: Inputs, results: Any, backwards: bool, interpret: bool) -> Any:
    def in_time(tile: Any, block: Any) -> tuple[Any, Any, int]:
        return plan.spans - 1 - block if backwards else block, tile, 0

    def blocked(a: Any) -> pl.BlockSpec:
        if a.ndim == 2:
            return pl.BlockSpec((plan.rows, a.shape[1]), lambda tile, block: (tile, 0))
        return pl.BlockSpec((plan.steps, plan.rows, a.shape[2]), in_time)

    def fixed(a: Any) -> pl.BlockSpec:
        # Always the same block, so it needs no second buffer to be fetched into.
        return pl.BlockSpec(a.shape, lambda tile, block: (0,) * a.ndim, pipeline_mode=pl.Buffered(1))

    specs = jax.tree.map(blocked, inputs)._replace(
        **{name: jax.tree.map(fixed, getattr(inputs, name)) for name in ("kernel", "bias", "units")}
    )
    if inputs.resets is not None:
        specs = specs._replace(resets=pl.BlockSpec((1, plan.rows, 1), in_time))
    return pl.pallas_call(
        kernel,
        grid=(plan.tiles, plan.spans),
        in_specs=(specs,),
        out_specs=jax.tree.map(blocked, results),
        out_shape=results,
        scratch_shapes=(tuple(pltpu.VMEM((plan.rows, plan.units), jnp.float32) for _ in inputs.ends),),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=plans.VMEM_LIMIT
        ),
        interpret=interpret,
        name="rnncore_backward" if backwards else "rnncore_forward",
    )(inputs)


def _precision(dtype: Any) -> Any:
    """Of the products: bfloat16 is exact in one pass."""
    full = dtype == jnp.float32 and _compat.matmul_precision() not in ONE_PASS
    return lax.Precision.HIGHEST if full else lax.Precision.DEFAULT


def _inputs(plan: Plan, loop: host.Loop, stacks: tuple, matrix: Array, ends: tuple) -> Inputs:
    rows = functools.partial(_rows, plan)
    resets = lengths = None
    if loop.lengths is not None:
        lengths = rows(loop.lengths.astype(jnp.int32)[:, None], spread=False)
    if loop.resets is not None:
        marks = _pad(loop.resets.astype(jnp.int32), (plan.spans * plan.steps, plan.tiles * plan.rows))
        marks = marks.reshape(plan.spans, plan.steps, -1, 1)
        shifts = jnp.arange(plan.steps, dtype=jnp.int32)[:, None, None]
        resets = jnp.sum(lax.shift_left(marks, jnp.broadcast_to(shifts, marks.shape)), 1, dtype=jnp.int32)
    bias, units = (() if a is None else tuple(_spread(plan, u[None]) for u in a) for a in (loop.rest_bias, loop.units))
    reset_carry = () if loop.reset_carry is None else tuple(map(rows, loop.reset_carry))
    return Inputs(stacks, matrix, bias, units, tuple(map(rows, ends)), reset_carry, lengths, resets)


# -------------------------------------------------------------------------------------- the layout


def _results(plan: Plan, like: Array) -> tuple[Any, Any]:
    """((how many units wide, dtype) -> a stack, a row) as a kernel is to make them."""

    def stack(count: int, dtype: Any) -> Any:
        shape = (plan.spans * plan.steps, plan.tiles * plan.rows, count * plan.units)
        return _compat.result_like(shape, dtype, like)

    return stack, _compat.result_like((plan.tiles * plan.rows, plan.units), jnp.float32, like)


def _matrix(plan: Plan, kernel: Array) -> Array:
    """(N, d, G, d) to (blocks, width, G*width); heads that share a block stand on its diagonal."""
    count, head, gates, _ = kernel.shape
    blocks = kernel.reshape(plan.blocks, plan.heads, head, gates, 1, head)
    diagonal = jnp.eye(plan.heads, dtype=kernel.dtype)[:, None, None, :, None]
    blocks = (blocks * diagonal).reshape(plan.blocks, plan.real, gates, plan.real)
    return _pad(blocks, (plan.blocks, plan.width, gates, plan.width)).reshape(plan.blocks, plan.width, -1)


def _spread(plan: Plan, a: Array) -> Array:
    """(..., n*H) with each block of units padded to its width."""
    blocks = a.reshape(*a.shape[:-1], -1, plan.real)
    return _pad(blocks, (*blocks.shape[:-1], plan.width)).reshape(*a.shape[:-1], -1)


def _rows(plan: Plan, a: Array, spread: bool = True) -> Array:
    a = _spread(plan, a) if spread else a
    return _pad(a, (plan.tiles * plan.rows, a.shape[1]))


def _stack(plan: Plan, a: Array, hidden: int) -> Array:
    a = _spread(plan, a)
    return _pad(a, (plan.spans * plan.steps, plan.tiles * plan.rows, a.shape[2]))


def _pad(a: Array, shape: tuple[int, ...]) -> Array:
    """Zeros after the end of each axis."""
    return a if a.shape == shape else jnp.pad(a, [(0, after - now) for now, after in zip(a.shape, shape, strict=True)])


def _cut(plan: Plan, sizes: tuple[int, int, int], a: Array) -> Array:
    """A result without its padding; sizes are (T, B, H)."""
    a = a[: sizes[0], : sizes[1]] if a.ndim == 3 else a[: sizes[1]]
    blocks = a.reshape(*a.shape[:-1], -1, plan.width)[..., : plan.real]
    return blocks.reshape(*a.shape[:-1], -1)
