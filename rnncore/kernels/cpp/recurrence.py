"""From the arrays of a run to the calls' and back."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from rnncore import _compat
from rnncore._types import Array, PyTree
from rnncore.cells.base import CellParams, PointwiseCell
from rnncore.cells.recurrent_kernels import Heads
from rnncore.kernels import kernel_body
from rnncore.kernels.cpp import compiler, emit
from rnncore.kernels.cpp.calls import Calls, Given, Moving
from rnncore.recurrence import plain
from rnncore.recurrence.backend import LoopBackend
from rnncore.recurrence.run import Constants, Differentiable, Request, Result, dense


class CppLoops(LoopBackend):
    """The loops, of requests that they can serve."""

    def forward(self, request: Request, differentiable: Differentiable, constants: Constants) -> Result:
        run = _Run(request, differentiable, constants)
        y, last, _ = run.calls.forward(run.moving(differentiable), run.given, False)
        return run.result(y, last)

    def forward_with_residuals(
        self, request: Request, differentiable: Differentiable, constants: Constants
    ) -> tuple[Result, PyTree]:
        run = _Run(request, differentiable, constants)
        y, last, kept = run.calls.forward(run.moving(differentiable), run.given, True)
        return run.result(y, last), kept

    def backward(
        self, request: Request, differentiable: Differentiable, constants: Constants, result: Result, residuals: PyTree,
        cotangents: Result, wanted: Differentiable,
    ) -> Differentiable:  # fmt: skip
        run = _Run(request, differentiable, constants)
        moving, back = jax.vjp(run.moving, differentiable)
        dy, dlast = run.flat(dense(cotangents, result))
        y, _ = run.flat(result)
        found: Any = run.calls.backward(moving, run.given, y, residuals, dy, dlast, wanted.xs)
        found = found if wanted.xs else found._replace(x=jnp.zeros_like(moving.x))
        return back(found)[0]

    def tangent(
        self, request: Request, differentiable: Differentiable, constants: Constants, result: Result, residuals: PyTree,
        tangents: Differentiable,
    ) -> Result:  # fmt: skip
        run = _Run(request, differentiable, constants)
        steps, rows, width, _ = residuals.shape
        heads, size = run.heads, request.cell.hidden_size // run.heads
        stacks = residuals.reshape(steps, rows, width, heads, -1)[..., :size]
        stacks = stacks.reshape(steps, *request.batch_shape, width, heads * size)
        stacks = tuple(jnp.moveaxis(stacks, -2, 0))
        return plain.tangent(request, differentiable, constants, result, stacks, tangents)


class _Run:
    """The arrays of a run as the calls have them."""

    def __init__(self, request: Request, differentiable: Differentiable, constants: Constants):
        cell = request.cell
        assert isinstance(cell, PointwiseCell)
        self.request, self.cell = request, cell
        self.rows, self.time_major = math.prod(request.batch_shape), request.time_axis == 0
        self.heads = cell.recurrence.num_heads if isinstance(cell.recurrence, Heads) else 1
        self.axes = _compat.varying_axes(differentiable.xs)
        self.given = Given(
            self._given(constants.recurrent_mask, (self.rows, cell.hidden_size), request.dtype),
            self._given(constants.lengths, (self.rows,), jnp.int32),
            self._given(constants.resets, (request.steps, self.rows), bool),
        )

    @property
    def calls(self) -> Calls:
        return _calls(self.cell, self.request.dtype, self.time_major)

    def _given(self, a: Array | None, shape: tuple[int, ...], dtype: Any) -> Array:
        return _compat.vary_over(jnp.zeros((0,), dtype) if a is None else a.reshape(shape).astype(dtype), self.axes)

    def moving(self, differentiable: Differentiable) -> Moving:
        """What the calls read, a linear function of what is differentiable."""
        params, xs, start, reset_carry = differentiable
        request, hidden, dtype = self.request, self.cell.hidden_size, self.request.dtype
        size = hidden // self.heads
        shape = (request.steps, self.rows) if self.time_major else (self.rows, request.steps)
        moving = Moving(
            xs.reshape(*shape, xs.shape[-1]), params.input_kernel,
            params.recurrent_kernel.reshape(self.heads, size, len(self.cell.gates), size),
            *_biases(self.cell, params), _rows(params.units, hidden, dtype), self._carry(start),
            jnp.zeros((0,), dtype) if reset_carry is None else self._carry(reset_carry),
        )  # fmt: skip
        # Inside shard_map the empty ones have to differ over the devices as the others do.
        return jax.tree.map(lambda a: _compat.vary_over(a, self.axes), moving)

    def _carry(self, fields: Any) -> Array:
        return jnp.stack([a.reshape(self.rows, self.cell.hidden_size) for a in fields])

    def flat(self, result: Result) -> tuple[Array, Array]:
        """(outputs, last carry) with one batch axis."""
        shape = (self.request.steps, self.rows) if self.time_major else (self.rows, self.request.steps)
        return result.outputs.reshape(*shape, self.cell.hidden_size), self._carry(result.carry)

    def result(self, y: Array, last: Array) -> Result:
        steps, batch, hidden = self.request.steps, self.request.batch_shape, self.cell.hidden_size
        carry = self.cell.Carry(*(a.reshape(*batch, hidden) for a in last))
        shape = (steps, *batch) if self.time_major else (*batch, steps)
        return Result(carry, y.reshape(*shape, hidden), None, None)


def _rows(arrays: Any, hidden: int, dtype: Any) -> Array:
    return jnp.stack(list(arrays)) if arrays else jnp.zeros((0, hidden), dtype)


def _biases(cell: PointwiseCell, params: CellParams) -> tuple[Array, Array]:
    """(bias of z, bias of r of the gates that do not see z + r alone): r's other biases are z's as well."""
    hidden, dtype = cell.hidden_size, params.input_kernel.dtype
    added, rest = kernel_body.of(cell, (1, 1), dtype.name).recurrent_biases(params)
    bias = jnp.zeros((len(cell.gates), hidden), dtype) if params.bias is None else params.bias
    return bias if added is None else bias + added, _rows(rest, hidden, dtype)


@functools.lru_cache(maxsize=256)
def _calls(cell: PointwiseCell, dtype: str, time_major: bool) -> Calls:
    targets = compiler.targets(emit.source(cell, dtype))
    return Calls(targets, kernel_body.of(cell, (1, 1), dtype).width, dtype, time_major)
