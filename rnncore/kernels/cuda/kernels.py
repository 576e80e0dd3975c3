"""Lays a recurrence out for the two CUDA kernels and launches them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rnncore._types import Array
from rnncore.cells.base import PointwiseCell
from rnncore.kernels import kernel_body
from rnncore.kernels.cuda import emit
from rnncore.kernels.cuda.plan import Device, Plan, Shape, plan_of
from rnncore.kernels.host import Cotangents, Loop, head_size


class Call(NamedTuple):
    """One launch.

    Fields:
      source: what is compiled, with `rnn_forward` or `rnn_backward` in it.
      plan: its layout.
      inputs, outputs: arrays, and shapes with dtypes, in the order of the kernel's argument; None for none.
      filled: the outputs that have all bits set before the kernel starts.
      scalars: integers that follow.
    """

    source: str
    plan: Plan
    inputs: tuple[Array | None, ...]
    outputs: tuple[jax.ShapeDtypeStruct | None, ...]
    filled: tuple[int, ...]
    scalars: tuple[int, ...]


Launch = Callable[[Call], list[Any]]
"""Runs a call: its outputs, None where there are none."""


class Outputs(NamedTuple):
    """Results of the forward loop.

    Fields:
      hs: (T, B, H), in z's dtype.
      residuals: (T, B, width*H), `Body.residuals` of every step, or None.
      others, gates: the carry's other fields and the gates of every step, (T, B, n*H) float32, or None.
      last: (B, H) float32 per field, after the last valid step, `start` where there is none.
    """

    hs: Array
    residuals: Array | None
    others: Array | None
    gates: Array | None
    last: tuple[Array, ...]


class Settings(NamedTuple):
    """Where and how: the GPU, `emit.PRODUCTS`'s name for the product, what launches, and what chooses the layout."""

    device: Device
    product: str
    launch: Launch
    choose: Callable[[Device, Shape], Plan | str] = plan_of

    def layout(
        self, cell: PointwiseCell, direction: str, dtype: str, stored: str, heads: int, rows: int, **options: Any
    ) -> Plan | str:
        """The layout of a run of so many heads and sequences, or the reason why there is none; see `Shape`."""
        shape = Shape(
            direction, dtype, stored, self.product, gates=len(cell.gates), fields=len(cell.Carry._fields),
            width=kernel_body.of(cell, (1, 1)).width, size=head_size(cell), heads=heads, sequences=rows, **options,
        )  # fmt: skip
        return self.choose(self.device, shape)


def layout(
    settings: Settings, cell: PointwiseCell, direction: str, run: Loop, rows: int, stored: str, **options: bool
) -> Plan | str:
    """The layout of a run of so many sequences, or the reason why there is none."""
    return settings.layout(
        cell, direction, run.kernel.dtype.name, stored, run.kernel.shape[0], rows, lengths=run.lengths is not None,
        resets=run.resets is not None, mask=run.mask is not None, zoneout=_kinds(run.zoneout), **options,
    )  # fmt: skip


def step(
    settings: Settings, cell: PointwiseCell, direction: str, run: Loop, rows: int, stored: str, **options: bool
) -> float | None:
    """Predicted microseconds of a step, or None where the run is parted."""
    found = layout(settings, cell, direction, run, rows, stored, **options)
    return None if isinstance(found, str) else found.step


def _parted(one: Callable[..., Any], run: Loop, rows: int, why: str, *stacks: Any) -> Any:
    """`one(run, *stacks)` of the first half of the sequences, and of the others; stacks are (..., B, H)."""
    if rows == 1:
        raise NotImplementedError(f"`unroll(backend='cuda')`: {why}. Use backend='scan'.")

    def of(part: slice) -> Any:
        def first(tree: Any) -> Any:
            return jax.tree.map(lambda a: a[part], tree)

        zoneout = None if run.zoneout is None else jax.tree.map(lambda a: a[:, part] if a.ndim else a, run.zoneout)
        some = run._replace(
            start=first(run.start), reset_carry=first(run.reset_carry), mask=first(run.mask),
            lengths=first(run.lengths), resets=None if run.resets is None else run.resets[:, part], zoneout=zoneout,
        )  # fmt: skip
        return one(some, *jax.tree.map(lambda a: a[..., part, :], stacks))

    half = -(-rows // 2)
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], -2), of(slice(half)), of(slice(half, None)))


def forward(
    settings: Settings, cell: PointwiseCell, run: Loop, z: Array, stored: str | None, states: bool = False
) -> Outputs:
    """The loop over z (T, B, G*H), which has the kernel's dtype; residuals in `stored`, or none.

    Sequences that cannot all run at once run some after the others.
    """
    steps, rows, _ = z.shape
    heads, size, _, _ = run.kernel.shape
    hidden, dtype = heads * size, run.kernel.dtype
    fields, width = cell.Carry._fields, kernel_body.of(cell, (1, 1)).width
    h, others = fields.index("h"), len(fields) - 1
    emitted = kernel_body.of(cell, (1, 1), "float32", states).emitted
    plan = layout(
        settings, cell, "forward", run, rows, stored or dtype.name, keeps=stored is not None, states=states
    )  # fmt: skip
    if isinstance(plan, str):
        return _parted(lambda run, z: forward(settings, cell, run, z, stored, states), run, rows, plan, z)
    start, reset_carry = _stacked(run.start), _stacked(run.reset_carry or ())
    call = Call(
        source=emit.source(cell, plan),
        plan=plan,
        inputs=(
            z, rows_of_outputs(plan, run.kernel), _float(run.rest_bias), _stacked(run.units), start,
            _masked_h(start, h, run.mask), reset_carry, _masked_h(reset_carry, h, run.mask), _float(run.mask),
            run.lengths, run.resets, *_zoneouts(run.zoneout, len(fields)),
        ),
        outputs=(
            jax.ShapeDtypeStruct((steps, rows, hidden), dtype),
            jax.ShapeDtypeStruct((steps, rows, heads, plan.shape.padded), dtype) if plan.apart else None,
            None if stored is None else jax.ShapeDtypeStruct((steps, rows, width * hidden), stored),
            jax.ShapeDtypeStruct((steps, rows, others * hidden), "float32") if states and others else None,
            jax.ShapeDtypeStruct((steps, rows, emitted * hidden), "float32") if emitted else None,
            jax.ShapeDtypeStruct((len(fields), rows, hidden), "float32"),
        ),
        filled=() if plan.sync != "grid" else (1,) if plan.apart else (0,),
        scalars=(steps, rows),
    )  # fmt: skip
    hs, _, residuals, stacks, gates, last = settings.launch(call)
    return Outputs(hs, residuals, stacks, gates, tuple(last))


def backward(
    settings: Settings, cell: PointwiseCell, run: Loop, residuals: Array, dhs: Array, dlast: tuple[Array, ...],
    dothers: Array | None = None, dgates: Array | None = None, *, states: bool = False,
) -> Cotangents:  # fmt: skip
    """The transposed loop over dhs (T, B, H); dlast enters after step length - 1, nowhere for length 0."""
    steps, rows, hidden = dhs.shape
    heads, _, gates, _ = run.kernel.shape
    dtype, stored = run.kernel.dtype, residuals.dtype
    fields, rest = len(cell.Carry._fields), len(kernel_body.of(cell, (1, 1)).rest)
    plan = layout(settings, cell, "backward", run, rows, stored.name, states=states)
    if isinstance(plan, str):
        stacks = (residuals, dhs, dlast, dothers, dgates)

        def part(run: Loop, *stacks: Any) -> Cotangents:
            return backward(settings, cell, run, *stacks, states=states)

        return _parted(part, run, rows, plan, *stacks)

    def sums(count: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count, rows, hidden), "float32")

    call = Call(
        source=emit.source(cell, plan),
        plan=plan,
        inputs=(
            rows_of_inputs(plan, run.kernel), residuals, _stacked(run.units), dhs.astype(dtype), _stacked(dlast),
            dothers, dgates, _float(run.mask), run.lengths, run.resets, *_zoneouts(run.zoneout, fields),
        ),
        outputs=(
            jax.ShapeDtypeStruct((steps, rows, gates * hidden), stored),
            jax.ShapeDtypeStruct((steps, rows, rest * hidden), stored) if rest else None,
            jax.ShapeDtypeStruct((steps, rows, heads, gates, plan.shape.padded), dtype) if plan.apart else None,
            sums(fields),
            None if run.resets is None else sums(fields),
            sums(len(run.units)) if run.units else None,
        ),
        filled=() if plan.sync != "grid" else (2,) if plan.apart else (0, 1) if rest else (0,),
        scalars=(steps, rows),
    )  # fmt: skip
    dz, drest, _, dstart, dreset_carry, dunits = settings.launch(call)
    return Cotangents(dz, drest, tuple(dstart), None if dreset_carry is None else tuple(dreset_carry), _parts(dunits))


# ----------------------------------------------------------------------- the matrix, as fragments
#
# A chunk is 4 lanes (q) of 2 instructions (m) of 2 words (the halves of k) of one or two numbers (j); a group of rows
# is 2 halves of 8 lanes (r).  The order is [head][block][group][part][chunk][set][m][r][q][half of k][half of rows].


def rows_of_outputs(plan: Plan, kernel: Array) -> Array:
    """(N, d in, G, d out) for the forward product: rows are units that come out, k those that go in."""
    depth, width = plan.split * plan.each * plan.shape.chunk, plan.blocks * plan.groups * 16
    heads, size, gates, _ = kernel.shape
    whole = jnp.pad(kernel, ((0, 0), (0, depth - size), (0, 0), (0, width - size)))
    parts = whole.reshape(
        heads, plan.split, plan.each, 4, 2, 2, plan.shape.chunk // 16, gates, plan.blocks, plan.groups, 2, 8
    )  # fmt: skip
    return parts.transpose(0, 8, 9, 1, 2, 7, 4, 11, 3, 5, 10, 6)


def rows_of_inputs(plan: Plan, kernel: Array) -> Array:
    """The same for the backward product: rows are units that went in, k the gates of those that came out."""
    heads, size, gates, _ = kernel.shape
    width, chunks = plan.blocks * plan.groups * 16, gates * plan.shape.padded // plan.shape.chunk
    whole = jnp.pad(kernel, ((0, 0), (0, width - size), (0, 0), (0, plan.shape.padded - size)))
    whole = whole.reshape(heads, width, chunks, plan.shape.chunk)
    whole = jnp.pad(whole, ((0, 0), (0, 0), (0, plan.split * plan.each - chunks), (0, 0)))
    parts = whole.reshape(heads, plan.blocks, plan.groups, 2, 8, plan.split, plan.each, 4, 2, 2, plan.shape.chunk // 16)
    return parts.transpose(0, 1, 2, 5, 6, 8, 4, 7, 9, 3, 10)


# ------------------------------------------------------------------------------------- the rest


def _stacked(arrays: tuple[Array, ...]) -> Array | None:
    return jnp.stack([a.astype(jnp.float32) for a in arrays]) if arrays else None


def _parts(a: Array | None) -> tuple[Array, ...]:
    return () if a is None else tuple(a)


def _float(a: Array | None) -> Array | None:
    return None if a is None else a.astype(jnp.float32)


def _masked_h(carry: Array | None, h: int, mask: Array | None) -> Array | None:
    """h in the dtype of the product."""
    return None if carry is None else carry[h] if mask is None else carry[h] * mask.astype(jnp.float32)


def _kinds(zoneout: tuple[Array | None, ...] | None) -> tuple[int, ...]:
    if zoneout is None:
        return ()
    return tuple(0 if a is None else 1 if a.dtype == jnp.bool_ else 2 if a.ndim else 3 for a in zoneout)


def _zoneouts(zoneout: tuple[Array | None, ...] | None, fields: int) -> list[Array | None]:
    if zoneout is None:
        return [None] * fields
    return [a if a is None or a.dtype == jnp.bool_ else a.astype(jnp.float32) for a in zoneout]
