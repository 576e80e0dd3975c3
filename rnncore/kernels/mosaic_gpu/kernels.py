"""Lays a recurrence out for the Mosaic GPU kernels and runs them: see `host.Kernels`."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from rnncore import _compat
from rnncore._types import Array
from rnncore.cells.base import PointwiseCell
from rnncore.kernels import host, kernel_body
from rnncore.kernels.mosaic_gpu import backward, forward
from rnncore.kernels.mosaic_gpu.plan import UNITS, Plan, plan_of


def kernels(interpret: bool = False) -> host.Kernels:
    """The two kernels; with `interpret` they run on a CPU, which takes JAX 0.11 or newer."""
    return host.Kernels(functools.partial(_forward, interpret), functools.partial(_backward, interpret))


def _planned(cell: PointwiseCell, loop: host.Loop, rows: int) -> Plan:
    plan = plan_of(cell, rows, not (loop.lengths is None and loop.resets is None), loop.resets is not None)
    assert isinstance(plan, Plan), "a layout fits or not whatever the number of sequences"
    return plan


def _forward(interpret: bool, cell: PointwiseCell, loop: host.Loop, z: Array, keep: str | None) -> host.Outputs:
    steps, rows, _ = z.shape
    plan = _planned(cell, loop, rows)
    part, dtype = kernel_body.of(cell, (UNITS, plan.batch)), z.dtype
    whole = plan.tiles * plan.batch
    over = functools.partial(_padded, rows=whole, dtype=dtype)
    bias = () if loop.rest_bias is None else tuple(loop.rest_bias)
    reset_r = None
    if loop.resets is not None:
        assert loop.reset_carry is not None
        reset_r = over(host.recurrent_matmul(cell, loop.kernel, loop.reset_carry[part.hidden].astype(dtype)[None])[0])
    arrays = forward.Arrays(
        z=over(z),
        kernel=loop.kernel.transpose(0, 2, 3, 1).reshape(plan.heads, -1, UNITS).astype(dtype),
        start=tuple(map(over, loop.start)),
        reset_carry=() if loop.resets is None else tuple(map(over, loop.reset_carry)),  # type: ignore[arg-type]
        reset_r=reset_r,
        units=tuple(_rows(a, whole, dtype) for a in loop.units),
        rest_bias=tuple(_rows(a, whole, dtype) for a in bias),
        flags=_flags(loop, steps, whole, dtype),
    )
    found = forward.run(plan, part, arrays, keep is not None, loop.lengths is not None, interpret, _types(z))
    found = jax.tree.map(lambda a: a[..., :rows, :], found)
    last = tuple(a.astype(jnp.float32) for a in found.last)
    if loop.lengths is not None:
        never = (loop.lengths == 0)[:, None]
        last = tuple(jnp.where(never, b.astype(a.dtype), a) for a, b in zip(last, loop.start, strict=True))
    return host.Outputs(found.hs, tuple(a.astype(keep) for a in found.others), last)


def _backward(
    interpret: bool, cell: PointwiseCell, loop: host.Loop, residuals: tuple[Array, ...], dhs: Array, dlast: Any
) -> host.Cotangents:
    steps, rows, _ = dhs.shape
    plan = _planned(cell, loop, rows)
    part, dtype = kernel_body.of(cell, (UNITS, plan.batch)), loop.kernel.dtype
    whole = plan.tiles * plan.batch
    over = functools.partial(_padded, rows=whole, dtype=dtype)
    arrays = backward.Arrays(
        residuals=tuple(map(over, residuals)),
        dhs=over(dhs),
        dlast=tuple(map(over, dlast)),
        kernel=loop.kernel.swapaxes(1, 2).reshape(plan.heads, -1, UNITS).astype(dtype),
        units=tuple(_rows(a, whole, dtype) for a in loop.units),
        flags=_flags(loop, steps, whole, dtype),
    )
    found = backward.run(
        plan, part, arrays, loop.lengths is not None, loop.resets is not None, interpret, _types(dhs)
    )  # fmt: skip
    z, rest, *sums = jax.tree.map(lambda a: a[..., :rows, :], found)
    return host.Cotangents(z, rest, *jax.tree.map(lambda a: a.astype(jnp.float32), sums))


def _padded(a: Array, rows: int, dtype: Any) -> Array:
    """(..., B, H) with as many sequences as the tiles have, in the kernel's dtype."""
    return jnp.pad(a.astype(dtype), [(0, 0)] * (a.ndim - 2) + [(0, rows - a.shape[-2]), (0, 0)])


def _rows(a: Array, rows: int, dtype: Any) -> Array:
    return jnp.broadcast_to(a.astype(dtype), (rows, a.shape[-1]))


def _flags(loop: host.Loop, steps: int, rows: int, dtype: Any) -> Array | None:
    """(T, B, units): 1 where a step begins with a reset, plus 2 where it is the last valid one; None for neither."""
    if loop.lengths is None and loop.resets is None:
        return None
    marks: Array = jnp.int32(0) if loop.resets is None else loop.resets.astype(jnp.int32)
    if loop.lengths is not None:
        marks = marks + 2 * (jnp.arange(steps)[:, None] == loop.lengths - 1)
    return _padded(jnp.broadcast_to(marks[..., None], (*marks.shape, UNITS)), rows, dtype)


def _types(like: Array) -> Any:
    """Makes output types of shapes: in the dtype of an array, and differing over the devices that it differs over."""
    return lambda shape: _compat.result_like(shape, like.dtype, like)
