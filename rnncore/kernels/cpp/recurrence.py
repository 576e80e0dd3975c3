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
from rnncore.cells.recurrent_kernels import Heads
from rnncore.kernels import kernel_body
from rnncore.kernels.cpp import compiler, emit
from rnncore.kernels.cpp.calls import Calls, Given, Moving
from rnncore.recurrence.request import Operands, Request, Result


def run(request: Request, params: CellParams, operands: Operands) -> Result:
    """Runs the cell, see `Operands` and `Result`."""
    cell = request.cell
    assert isinstance(cell, PointwiseCell)
    rows, hidden, dtype = math.prod(request.batch_shape), cell.hidden_size, request.dtype
    time_major = request.time_axis == 0

    def carry(fields: Any) -> Array:
        return jnp.stack([a.reshape(rows, hidden) for a in fields])

    def given(a: Array | None, shape: tuple[int, ...], dtype: Any) -> Array:
        return jnp.zeros((0,), dtype) if a is None else a.reshape(shape).astype(dtype)

    heads = cell.recurrence.num_heads if isinstance(cell.recurrence, Heads) else 1
    size = hidden // heads
    moving = Moving(
        operands.xs.reshape((request.steps, rows, -1) if time_major else (rows, request.steps, -1)),
        params.input_kernel, params.recurrent_kernel.reshape(heads, size, len(cell.gates), size),
        *_biases(cell, params), _rows(params.units, hidden, dtype), carry(operands.carry),
        jnp.zeros((0,), dtype) if operands.resets is None else carry(operands.target),
    )  # fmt: skip
    # Inside shard_map the empty ones have to differ over the devices as the others do.
    axes = _compat.varying_axes(moving.x)
    moving = jax.tree.map(lambda a: _compat.vary_over(a, axes), moving)
    lengths = None if operands.lengths is None else jnp.clip(operands.lengths, 0, request.steps)
    besides = Given(
        given(operands.mask, (rows, hidden), dtype), given(lengths, (rows,), jnp.int32),
        given(operands.resets, (request.steps, rows), bool),
    )  # fmt: skip
    y, last = _recurrence(cell, dtype, time_major)(moving, besides)
    final = type(operands.carry)(*(a.reshape(*request.batch_shape, hidden) for a in last))
    batch = (request.steps, *request.batch_shape) if time_major else (*request.batch_shape, request.steps)
    return Result(final, y.reshape(*batch, hidden), None, None)


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
def _recurrence(cell: PointwiseCell, dtype: str, time_major: bool) -> Any:
    """(moving, given) -> (outputs, last carry), with its derivative."""
    targets = compiler.targets(emit.source(cell, dtype))
    calls = Calls(targets, kernel_body.of(cell, (1, 1), dtype).width, dtype, time_major)

    @jax.custom_vjp
    def whole(moving: Moving, given: Given) -> Any:
        return calls.forward(moving, given, False)[:2]

    def forward(moving: Any, given: Any) -> Any:
        wanted = _Wanted(moving.x.perturbed)
        moving, given = Moving(*(a.value for a in moving)), Given(*(a.value for a in given))
        y, last, kept = calls.forward(moving, given, True)
        return (y, last), (wanted, moving, given, y, kept)

    def backward(held: Any, cotangents: Any) -> Any:
        wanted, moving, given, y, kept = held
        pairs = zip((y, moving.start), cotangents, strict=True)
        dy, dlast = (jnp.zeros_like(a) if isinstance(d, SymbolicZero) else d for a, d in pairs)
        found: Any = calls.backward(moving, given, y, kept, dy, dlast, wanted.inputs)
        return found if wanted.inputs else found._replace(x=None), None

    whole.defvjp(forward, backward, symbolic_zeros=True)
    return whole
