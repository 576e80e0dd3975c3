"""From the arrays of a run to the calls' and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rnncore import _compat
from rnncore._types import Array, PyTree
from rnncore.cells.base import Cell, CellParams, GatedCell
from rnncore.cells.recurrent_kernels import Diagonal
from rnncore.cells.reductions import ReducingCell, Whole
from rnncore.cells.structured_kernels import LowRank
from rnncore.kernels import host, kernel_body
from rnncore.kernels.cpp import calls, emit
from rnncore.kernels.cpp.calls import CHOSEN, NONE, SHARE, SHARES, Calls, Out
from rnncore.recurrence import plain, step
from rnncore.recurrence.backend import LoopBackend
from rnncore.recurrence.run import Differentiable, Problem, Request, Result

STRETCH = 48
"""Of every so many steps the forward loop keeps the carry's fields that the backward one forms again in between."""


def compiled_cell(cell: Cell) -> GatedCell:
    """The cell that is compiled: its whole update with the part of the inputs, where that takes means over units."""
    assert isinstance(cell, GatedCell)
    return Whole.of(cell) if isinstance(cell, ReducingCell) else cell


def variant_of(request: Request) -> emit.Variant:
    """The types of a run.  A mixture is brought to the dtype of the sums before it, and back after it."""
    dtypes = request.dtypes | {request.dtype}
    real = "float64" if "float64" in dtypes else "float32"
    stored = request.dtype if len(dtypes) == 1 else real
    residual = request.residual_dtype or stored
    if request.recompute != "nothing" or jnp.finfo(residual).bits > jnp.finfo(real).bits:
        residual = real
    return emit.Variant(real, stored, residual, request.return_states)


class CppLoops(LoopBackend):
    """The loops, of requests that they can serve."""

    maps_into_batch = True

    def forward(self, problem: Problem, keep: bool) -> tuple[Result, PyTree]:
        run = _Run(problem)
        out, kept = run.compiled.forward(run.arrays(problem.differentiable), run.constants, keep)
        return run.result(out), run.residuals(kept) if keep else None

    def backward(
        self, problem: Problem, result: Result, residuals: PyTree, cotangents: Result, wanted: Differentiable
    ) -> Differentiable:
        run = _Run(problem)
        arrays, back = jax.vjp(run.arrays, problem.differentiable)
        dout = run.cotangents(cotangents)
        stored, y = run.stored(residuals), run.outputs(result)
        found: Any = run.compiled.backward(arrays, run.constants, y, stored, dout, wanted.xs)
        return back(found if wanted.xs else found._replace(x=jnp.zeros_like(arrays.x)))[0]

    def tangent(self, problem: Problem, result: Result, residuals: PyTree, tangents: Differentiable) -> Result:
        run = _Run(problem)
        # Inside shard_map the linearised step depends on other values than the one that was compiled.
        if run.axes or not self.residuals_move(problem.request):
            return super().tangent(problem, result, residuals, tangents)
        return plain.tangent(problem, result, run.stacks(problem, result, residuals), tangents)

    def residuals_move(self, request: Request) -> bool:
        if isinstance(request.cell, ReducingCell):
            return False
        one_dtype = len({*variant_of(request)[:3], *request.dtypes}) == 1
        return one_dtype and request.recompute == "nothing" and not request.return_states

    def plain_with_residuals(self, problem: Problem) -> tuple[Result, PyTree]:
        result, kept = plain.run_with_residuals(problem)
        stacks = plain.residuals(problem, result.outputs, kept)
        # Whatever is formed again is formed from the carries of the loop itself; where nobody does, it does not run.
        fixed = problem._replace(differentiable=jax.lax.stop_gradient(problem.differentiable))
        _, own = self.forward(fixed, True)
        return result, (_Run(problem).packed(stacks, own[0].shape), *own[1:])


class _Run:
    """The arrays of a run as the calls have them: one batch axis, a carry as one array, few dtypes."""

    def __init__(self, problem: Problem):
        request, differentiable, constants = problem
        cell = compiled_cell(request.cell)
        start = differentiable.initial_carry
        self.request, self.cell, self.dtypes = request, cell, [a.dtype for a in start]
        self.rows, self.time_major = math.prod(request.batch_shape), request.time_axis == 0
        self.heads = host.head_count(cell)
        self.variant = variant_of(request)
        self.part = emit.body(cell, self.variant)
        self.plan, rematerialize = emit.plan(cell, self.variant), request.recompute != "nothing"
        chunk_size = STRETCH
        if rematerialize:
            chunk_size = min(request.checkpoint_every or max(8, math.isqrt(request.steps)), request.steps)
        self.axes = _compat.varying_axes(differentiable.xs)
        steps, hidden, real = request.steps, cell.hidden_size, self.variant.real
        zoneout, shares, chosen, stacks = self._zoneout(constants.zoneout)
        self.compiled = Calls(cell, self.variant, self.time_major, zoneout, chunk_size, rematerialize)
        self.constants = calls.Constants(
            self._one(constants.recurrent_mask, (self.rows, hidden), real),
            self._one(constants.lengths, (self.rows,), jnp.int32),
            self._one(constants.resets, (steps, self.rows), bool),
            shares, chosen, stacks,
        )  # fmt: skip

    def residuals(self, kept: tuple[Array, Array]) -> tuple[Array, ...]:
        """What the calls keep with the batch axes of the request, those that there are."""
        return tuple(a.reshape(a.shape[0], *self.request.batch_shape, *a.shape[2:]) for a in kept if a.ndim > 1)

    def stored(self, residuals: tuple[Array, ...]) -> tuple[Array, Array]:
        """The inverse."""
        there = iter(a.reshape(a.shape[0], self.rows, *a.shape[-2:]) for a in residuals)
        kept = self._one(None, (), self.variant.residual) if self.compiled.rematerialize else next(there)
        return kept, next(there) if self.compiled.begins else self._one(None, (), self.variant.real)

    def stacks(self, problem: Problem, result: Result, residuals: tuple[Array, ...]) -> tuple[Array, ...]:
        """All that the linearised step depends on, as (T, *batch, H) arrays in the order of `Body.residuals`."""
        request, differentiable, constants = problem
        plan, hidden, kept = self.plan, self.cell.hidden_size, residuals[0]
        of_heads = kept.reshape(*kept.shape[:-1], self.heads, -1)[..., : hidden // self.heads]
        rows = of_heads.reshape(*kept.shape[:-1], hidden)
        # Slices, which XLA takes from what `packed` put together without writing it; it would write it transposed.
        found = {n: jax.lax.index_in_dim(rows, k, rows.ndim - 2, False) for k, n in enumerate(plan.kept)}
        resets, zoneout = step.per_step(request, constants)
        start, reset_carry = differentiable.initial_carry, differentiable.reset_carry
        before = plain.before(problem, result.outputs)
        if plan.h >= 0:
            found[plan.h] = before
        if plan.reformed:
            units = step.spread_units(differentiable.params, start.h)

            def recompute(carry: Any, now: Any) -> tuple[Any, Any]:
                h, rows, resets, zoneout = now
                old = step.reset(resets, reset_carry, carry)._replace(h=h)
                rows = [rows.get(n, h) for n in range(self.part.width)]  # the others are not read
                fresh = kernel_body.evaluate(plan.reform, (*units, *rows, *old), {})
                names = [old._fields[f] for f, _ in plan.reformed]
                new = step.blend(zoneout, old, old._replace(**dict(zip(names, fresh, strict=True))))
                return new, [old[f] for f, _ in plan.reformed]

            _, olds = jax.lax.scan(recompute, start, (before, found, resets, zoneout))
            found |= dict(zip([n for _, n in plan.reformed], olds, strict=True))
        return tuple(found[n] for n in range(self.part.width))

    def packed(self, stacks: tuple[Array, ...], shape: tuple[int, ...]) -> Array:
        """The inverse, for those of the arrays that are kept."""
        rows = jnp.stack([stacks[n] for n in self.plan.kept], -2)
        rows = rows.reshape(*rows.shape[:-1], self.heads, -1)
        padding = shape[-1] // self.heads - rows.shape[-1]
        return jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, padding)]).reshape(shape)

    def _one(self, a: Array | None, shape: tuple[int, ...], dtype: Any) -> Array:
        """An array, or one that stands for none."""
        if a is None:
            # Inside shard_map it has to differ over the devices as the others do.
            return _compat.vary_over(jnp.zeros((0,), dtype), self.axes)
        return a.reshape(shape).astype(dtype)

    def _stack(self, arrays: Sequence[Array | None], shape: tuple[int, ...], dtype: Any) -> Array:
        """Arrays below each other, zeros in the place of None; one that stands for none if all are."""
        if all(a is None for a in arrays):
            return self._one(None, shape, dtype)
        zeros = jnp.zeros(shape, dtype)
        return jnp.stack([zeros if a is None else self._one(a, shape, dtype) for a in arrays])

    def _zoneout(self, zoneout: Any) -> tuple[tuple[int, ...], Array, Array, Array]:
        """(kind of each field, shares of fields, booleans of those that have them, shares at every step)."""

        def kind(a: Array | None) -> int:
            return NONE if a is None else SHARE if a.ndim == 0 else CHOSEN if a.dtype == jnp.bool_ else SHARES

        fields = zoneout or ()
        kinds, real = tuple(map(kind, fields)), self.variant.real
        shape = (self.request.steps, self.rows, self.cell.hidden_size)

        def of(which: int, shape: tuple[int, ...], dtype: Any) -> Array:
            found = [a for a, k in zip(fields, kinds, strict=True) if k == which]
            return self._stack(found, shape, dtype)

        shares = [a if k == SHARE else None for a, k in zip(fields, kinds, strict=True)]
        return kinds, self._stack(shares, (), real), of(CHOSEN, shape, bool), of(SHARES, shape, real)

    def arrays(self, differentiable: Differentiable) -> calls.Differentiable:
        """What the calls read, a linear function of what is differentiable."""
        params, xs, start, reset_carry = differentiable
        if isinstance(self.cell, Whole):
            params = self.cell.params(params)
        real, hidden = self.variant.real, self.cell.hidden_size
        params = jax.tree.map(lambda a: a.astype(real), params)
        kernel, readouts = params.recurrent_kernel, jnp.zeros((0, hidden), real)
        if isinstance(self.cell.recurrence, LowRank):
            readouts, kernel = kernel[:, 0], kernel[:, 1:]
        elif not isinstance(self.cell.recurrence, Diagonal):
            size = hidden // self.heads
            kernel = kernel.reshape(self.heads, size, len(self.cell.gates), size)
        arrays = calls.Differentiable(
            xs.reshape(*self._sequences, xs.shape[-1]).astype(self.variant.stored), params.input_kernel, kernel,
            readouts, *self._biases(params), _rows(params.units, hidden, real), self._carry(start),
            self._carry(reset_carry),
        )  # fmt: skip
        return jax.tree.map(lambda a: _compat.vary_over(a, self.axes), arrays)

    @property
    def _sequences(self) -> tuple[int, int]:
        return (self.request.steps, self.rows) if self.time_major else (self.rows, self.request.steps)

    def _carry(self, fields: Any) -> Array:
        none = [None] * len(self.dtypes)
        return self._stack(none if fields is None else fields, (self.rows, self.cell.hidden_size), self.variant.real)

    def _biases(self, params: CellParams) -> tuple[Array, Array]:
        """(bias of z, bias of r of the gates that do not see z + r alone): r's other biases are z's as well."""
        hidden, real = self.cell.hidden_size, self.variant.real
        added, rest = self.part.recurrent_biases(params)
        bias = jnp.zeros((len(self.cell.gates), hidden), real) if params.bias is None else params.bias
        return bias if added is None else bias + added, _rows(rest, hidden, real)

    def outputs(self, result: Result) -> Array:
        return result.outputs.reshape(*self._sequences, self.cell.hidden_size).astype(self.variant.stored)

    def result(self, out: Out) -> Result:
        """What the calls gave as the caller has it."""
        steps, batch, hidden = self.request.steps, self.request.batch_shape, self.cell.hidden_size
        last = [a.reshape(*batch, hidden) for a in out.last]
        outputs = out.y.reshape(*((steps, *batch) if self.time_major else (*batch, steps)), hidden)
        stacks = (
            list(out.states.reshape(out.states.shape[0], steps, *batch, hidden)) if self.request.return_states else []
        )
        others = len(last) - 1
        return host.result(self.request, self.part, self.dtypes, last, outputs, stacks[:others], stacks[others:])

    def cotangents(self, of: Result) -> Out:
        """The transpose of `result`, of cotangents that may be None."""
        hidden, h, stored = self.cell.hidden_size, self.part.hidden, self.variant.stored
        last = self._carry(of.carry)
        dy, states = of.outputs, []
        if self.request.return_states:
            more = of.carries[h]
            if more is not None:
                more = jnp.moveaxis(more, 0, self.request.time_axis)
                dy = more if dy is None else dy + more
            gates = jax.tree.leaves(of.gates, is_leaf=lambda a: a is None)
            states = [*of.carries[:h], *of.carries[h + 1 :], *gates]
        y = self._one(dy, (*self._sequences, hidden), stored)
        return Out(y, last, self._stack(states, (self.request.steps, self.rows, hidden), stored))


def _rows(arrays: Any, hidden: int, dtype: Any) -> Array:
    return jnp.stack(list(arrays)) if arrays else jnp.zeros((0, hidden), dtype)
