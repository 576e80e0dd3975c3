"""From `unroll`'s arrays to the calls' and back, and the derivative: a `jax.custom_vjp` of one call each way."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from rnncore import _compat
from rnncore._types import Array
from rnncore.cells.base import CellParams, PointwiseCell
from rnncore.cells.recurrent_kernels import Diagonal, Heads
from rnncore.kernels import kernel_body
from rnncore.kernels.cpp import compiler, emit
from rnncore.kernels.cpp.calls import CHOSEN, NONE, SHARE, SHARES, Calls, Given, Moving, Out
from rnncore.recurrence.request import Operands, Request, Result


def variant_of(request: Request, inputs: str, outputs: str) -> emit.Variant:
    """The types of a run on inputs and carries of these dtypes."""
    real = "float64" if "float64" in request.dtypes | {request.dtype} else "float32"
    stored = inputs if inputs == outputs else real
    residual = request.residual_dtype or stored
    if request.recompute != "nothing" or jnp.finfo(residual).bits > jnp.finfo(real).bits:
        residual = real
    return emit.Variant(real, stored, residual, request.states)


def run(request: Request, params: CellParams, operands: Operands) -> Result:
    """Runs the cell, see `Operands` and `Result`."""
    cell = request.cell
    assert isinstance(cell, PointwiseCell)
    rows, hidden, steps = math.prod(request.batch_shape), cell.hidden_size, request.steps
    features = request.input_size
    time_major = request.time_axis == 0
    variant = variant_of(request, operands.xs.dtype.name, operands.carry.h.dtype.name)
    real = variant.real

    def carry(fields: Any) -> Array:
        return jnp.stack([a.reshape(rows, hidden).astype(real) for a in fields])

    def given(a: Array | None, shape: tuple[int, ...], dtype: Any) -> Array:
        return jnp.zeros((0,), dtype) if a is None else a.reshape(shape).astype(dtype)

    params = jax.tree.map(lambda a: a.astype(real), params)
    kernel = params.recurrent_kernel
    if not isinstance(cell.recurrence, Diagonal):
        heads = cell.recurrence.num_heads if isinstance(cell.recurrence, Heads) else 1
        kernel = kernel.reshape(heads, hidden // heads, len(cell.gates), hidden // heads)
    moving = Moving(
        operands.xs.reshape((steps, rows, features) if time_major else (rows, steps, features)).astype(variant.stored),
        params.input_kernel, kernel, *_biases(cell, params), _rows(params.units, hidden, real), carry(operands.carry),
        jnp.zeros((0,), real) if operands.resets is None else carry(operands.target),
    )  # fmt: skip
    # Inside shard_map the empty ones have to differ over the devices as the others do.
    axes = _compat.varying_axes(moving.x)
    moving = jax.tree.map(lambda a: _compat.vary_over(a, axes), moving)
    lengths = None if operands.lengths is None else jnp.clip(operands.lengths, 0, steps)
    kinds, *stays = _zoneout(operands.stay, steps, rows, hidden, real)
    besides = Given(
        given(operands.mask, (rows, hidden), real), given(lengths, (rows,), jnp.int32),
        given(operands.resets, (steps, rows), bool), *stays,
    )  # fmt: skip
    every = 0
    if request.recompute != "nothing":
        every = min(request.checkpoint_every or max(8, math.isqrt(steps)), steps)
    y, last, states = _recurrence(cell, variant, time_major, kinds, every)(moving, besides)

    batch = (steps, *request.batch_shape) if time_major else (*request.batch_shape, steps)
    outputs = y.reshape(*batch, hidden).astype(operands.carry.h.dtype)
    final = [a.reshape(*request.batch_shape, hidden) for a in last]
    final = type(operands.carry)(*(a.astype(b.dtype) for a, b in zip(final, operands.carry, strict=True)))
    if not request.states:
        return Result(final, outputs, None, None)
    stacks = [a.reshape(steps, *request.batch_shape, hidden) for a in states]
    carries = stacks[: len(final) - 1]
    carries.insert(final._fields.index("h"), jnp.moveaxis(outputs, request.time_axis, 0))
    carries = type(final)(*(a.astype(b.dtype) for a, b in zip(carries, final, strict=True)))
    named = jax.tree.unflatten(jax.tree.structure(emit.body(cell, variant).gates), stacks[len(final) - 1 :])
    return Result(final, outputs, carries, jax.tree.map(lambda a: a.astype(request.dtype), named))


def _zoneout(stay: Any, steps: int, rows: int, hidden: int, real: str) -> tuple[tuple[int, ...], Array, Array, Array]:
    """(kind of each field, shares of fields, booleans of those that have them, shares at every step)."""
    stay = () if stay is None else stay
    kinds = tuple(
        NONE if a is None else SHARE if a.size == steps else CHOSEN if a.dtype == jnp.bool_ else SHARES for a in stay
    )
    number = [jnp.zeros((), real) if kind != SHARE else a.reshape(-1)[0].astype(real)
              for a, kind in zip(stay, kinds, strict=True)]  # fmt: skip

    def stacks(which: int, dtype: Any) -> Array:
        found = [a.reshape(steps, rows, hidden).astype(dtype) for a, k in zip(stay, kinds, strict=True) if k == which]
        return jnp.stack(found) if found else jnp.zeros((0,), dtype)

    share = jnp.stack(number) if SHARE in kinds else jnp.zeros((0,), real)
    return kinds, share, stacks(CHOSEN, bool), stacks(SHARES, real)


def _rows(arrays: Any, hidden: int, dtype: Any) -> Array:
    return jnp.stack(list(arrays)) if arrays else jnp.zeros((0, hidden), dtype)


def _biases(cell: PointwiseCell, params: CellParams) -> tuple[Array, Array]:
    """(bias of z, bias of r of the gates that do not see z + r alone): r's other biases are z's as well."""
    hidden, dtype = cell.hidden_size, params.input_kernel.dtype
    added, rest = kernel_body.of(cell, (1, 1), dtype.name).recurrent_biases(params)
    bias = jnp.zeros((len(cell.gates), hidden), dtype) if params.bias is None else params.bias
    return bias if added is None else bias + added, _rows(rest, hidden, dtype)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Wanted:
    """Whether somebody wants the gradient of the inputs: a sixth of the backward products is its."""

    inputs: bool


@functools.lru_cache(maxsize=256)
def _recurrence(
    cell: PointwiseCell, variant: emit.Variant, time_major: bool, kinds: tuple[int, ...], every: int
) -> Any:
    """(moving, given) -> results, with its derivative."""
    part = emit.body(cell, variant)
    targets = compiler.targets(emit.source(cell, variant), type(cell).__name__)
    calls = Calls(
        tuple(targets.values()), variant, part.width, len(cell.Carry._fields), part.emitted, time_major, kinds, every
    )

    @jax.custom_vjp
    def whole(moving: Moving, given: Given) -> Any:
        return calls.forward(moving, given, False)[0]

    def forward(moving: Any, given: Any) -> Any:
        wanted = _Wanted(moving.x.perturbed)
        moving, given = Moving(*(a.value for a in moving)), Given(*(a.value for a in given))
        out, kept = calls.forward(moving, given, True)
        return out, (wanted, moving, given, out.y, kept)

    def backward(held: Any, cotangents: Any) -> Any:
        wanted, moving, given, y, kept = held
        dout = Out(*(jnp.zeros((0,), d.dtype) if isinstance(d, SymbolicZero) else d for d in cotangents))
        found: Any = calls.backward(moving, given, y, kept, dout, wanted.inputs)
        return found if wanted.inputs else found._replace(x=None), None

    whole.defvjp(forward, backward, symbolic_zeros=True)
    return whole
