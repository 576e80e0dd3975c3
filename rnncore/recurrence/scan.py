"""Backend "scan": any gated cell over time in XLA's loops, on every platform, with every option.

Forward, a chunk of K steps projects its inputs and runs; row t of a buffer for all steps takes what step t gives, so
that nothing is copied out of a chunk or turned to time-major as a whole.  Backward, the chunks are taken from the last
to the first: a loop transposes the linearised step L_t and writes the cotangents of the chunk's pre-activations into
one slab, and then

  dU += (mask h)^T slab,   dW += x^T slab,   db += sum slab,   dx = slab W^T

once a chunk.  Dtypes: all floating ones; products take and give the dtype of their operands and follow
`jax.default_matmul_precision`, forward and backward.  Memory: see `recompute` in `rnncore.unroll`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rnncore._types import Array, PyTree
from rnncore.cells import pointwise
from rnncore.cells.base import GatedCell
from rnncore.cells.recurrent_kernels import Recurrence
from rnncore.recurrence import plain
from rnncore.recurrence import step as steps
from rnncore.recurrence.backend import LoopBackend
from rnncore.recurrence.chunks import chunk_size, over_chunks
from rnncore.recurrence.run import Differentiable, Problem, Request, Result, dense
from rnncore.recurrence.step import Inputs, LinearizedStep, Step
from rnncore.recurrence.time_buffers import at, blank, packed, put, stretch, unpacked


class Scan(LoopBackend):
    """See the module."""

    name = "scan"
    keeps_time_axis = True
    takes_symbolic = True
    maps_into_batch = True

    def takes_product(self, recurrence: Recurrence) -> bool:
        return True

    def unsupported(self, request: Request) -> str | None:
        if not isinstance(request.cell, GatedCell):
            return f"{type(request.cell).__name__} is not a PointwiseCell, so its derivative rules cannot be derived"
        changed = pointwise.why_not_as_declared(request.cell, "recurrent_matmul", "output", "split", "update")
        return changed or pointwise.why_not_a_product(request.cell)

    def forward(self, problem: Problem, keep: bool) -> tuple[Result, PyTree]:
        return _Run(problem).forward(keep)

    def backward(
        self, problem: Problem, result: Result, residuals: PyTree, cotangents: Result, wanted: Differentiable
    ) -> Differentiable:
        return _Backward(_Run(problem), result, residuals, cotangents, wanted).all_chunks()

    def tangent(self, problem: Problem, result: Result, residuals: PyTree, tangents: Differentiable) -> Result:
        if problem.request.recompute != "nothing":
            return super().tangent(problem, result, residuals, tangents)
        stacks = plain.residuals(problem, result.outputs, _Run(problem).restored(residuals))
        return plain.tangent(problem, result, stacks, tangents)

    def residuals_move(self, request: Request) -> bool:
        return request.recompute == "nothing" and request.residual_dtype is None

    def plain_with_residuals(self, problem: Problem) -> tuple[Result, PyTree]:
        return plain.run_with_residuals(problem)


class Rows(NamedTuple):
    """Buffers over time, or one row of each.

    Fields:
      outputs: h.
      carries: the other fields of the carry, where states are wanted.
      gates: what the step emits.
      residuals: what the backward run needs.
    """

    outputs: Any
    carries: Any
    gates: Any
    residuals: Any


class _Run:
    """A run in chunks, with what its functions share."""

    def __init__(self, problem: Problem):
        request, differentiable, constants = self.request, self.differentiable, self.constants = problem
        assert isinstance(request.cell, GatedCell)
        self.cell, self.axis = request.cell, request.time_axis
        self.start = differentiable.initial_carry
        self.chunk_size = chunk_size(request)
        self.units = steps.spread_units(differentiable.params, self.start.h)
        self.input_params = steps.input_params(self.cell, differentiable.params)
        self.recurrent_params = steps.recurrent_params(differentiable.params)
        self.product = steps.recurrent_product(self.cell)
        self.step = steps.of(problem)
        self.resets, self.zoneout = steps.per_step(request, constants)

    def inputs(self, first: Any, size: int) -> Inputs:
        """The inputs of a stretch of steps, projected."""
        slab = self.cell.project(self.input_params, stretch(self.differentiable.xs, first, size, self.axis))
        xs, _ = self.step.part(slab, None)
        return self.inputs_without_xs(first, size)._replace(xs=xs)

    def inputs_without_xs(self, first: Any, size: int) -> Inputs:
        resets, zoneout = stretch((self.resets, self.zoneout), first, size, 0)
        return Inputs(
            self.recurrent_params, self.units, None, self.start, self.differentiable.reset_carry, resets,
            self.constants.recurrent_mask, zoneout,
        )  # fmt: skip

    @functools.cached_property
    def linear(self) -> LinearizedStep:
        """The derivative of its steps, which keeps all that a backward run cannot form chunk by chunk."""
        first = self.inputs(0, 1)
        one = first._replace(xs=at(first.xs, 0, 0))
        return LinearizedStep(self.step, self.product, one, ("state", "sum", "input"))

    @functools.cached_property
    def keeping(self) -> Step:
        """The step that also emits what the backward run needs of it."""
        if self.request.recompute == "nothing":
            return self.linear.forward

        def update(units: Any, x: Any, rest: Any, s: Any) -> Any:
            new, emitted = self.step.update(units, x, rest, s)
            return new, (emitted, _without_h(s) if self.request.recompute == "gates" else None)

        return Step(update, self.step.add_recurrent)

    # ---------------------------------------------------------------------------------- forward

    def forward(self, keep: bool) -> tuple[Result, PyTree]:
        """(result, residuals): of a run that keeps none, None."""
        lengths, start = self.constants.lengths, self.start
        step = self.keeping if keep else self.step

        def advance(inputs: Inputs, k: Any, t: Any, state: Any) -> Any:
            carry, last, rows = state
            new, row = self.one(step, keep, inputs, k, carry)
            if lengths is not None:
                last = steps.at_end(t == lengths - 1, new, last)
            return new, last, self._put(rows, self._packed(row), t)

        def chunk(first: Any, size: int, state: Any) -> Any:
            (carry, last, rows), begins = state
            if begins is not None:
                begins = put(begins, carry, first // self.chunk_size, 0)
            inputs = self.inputs(first, size)
            return lax.fori_loop(0, size, lambda k, s: advance(inputs, k, first + k, s), (carry, last, rows)), begins

        shapes = jax.eval_shape(lambda: self._packed(self.one(step, keep, self.inputs(0, 1), 0, start)[1]))
        rows = Rows(blank(shapes.outputs, start.h, self.request.steps, self.axis), *(
            blank(a, start.h, self.request.steps, 0) for a in shapes[1:]
        ))  # fmt: skip
        begins = None
        if keep and self.request.recompute == "chunk":
            begins = blank(start, start.h, math.ceil(self.request.steps / self.chunk_size), 0)
        state = ((start, start, rows), begins)
        (carry, last, rows), begins = over_chunks(chunk, state, self.request.steps, self.chunk_size)
        carries = None
        if self.request.return_states:
            carries = _with_h(carry, rows.carries, jnp.moveaxis(rows.outputs, self.axis, 0))
        result = Result(carry if lengths is None else last, rows.outputs, carries, rows.gates)
        return result, rows.residuals if begins is None else begins

    def one(self, step: Step, keep: bool, inputs: Inputs, k: Any, carry: Any) -> tuple[Any, Rows]:
        """Step k of a stretch: the new carry and its rows."""
        now = inputs._replace(**{name: at(getattr(inputs, name), k, 0) for name in ("xs", "resets", "zoneout")})
        new, emitted = steps.advance(step, self.product, now, carry)
        gates, residuals = emitted if keep else (emitted, None)
        return new, Rows(new.h, _without_h(new) if self.request.return_states else None, gates, residuals)

    def _put(self, rows: Rows, row: Rows, t: Any) -> Rows:
        outputs = put(rows.outputs, row.outputs, t, self.axis)
        return Rows(outputs, *(put(a, b, t, 0) for a, b in zip(rows[1:], row[1:], strict=True)))

    def _packed(self, row: Rows) -> Rows:
        """The rows with residuals in the dtype in which they are stored."""
        dtype = self.request.residual_dtype
        if dtype is None or self.request.recompute == "chunk":
            return row
        return row._replace(residuals=jax.tree.map(lambda a: packed(a, dtype), row.residuals))

    def restored(self, residuals: PyTree) -> PyTree:
        """Rows of residuals in the dtypes of the step."""
        dtype = self.request.residual_dtype
        if dtype is None:
            return residuals
        types = jax.eval_shape(lambda: self.one(self.keeping, True, self.inputs(0, 1), 0, self.start)[1].residuals)
        return jax.tree.map(lambda a, b: unpacked(a, dtype).astype(b.dtype), residuals, types)

    def rerun(self, first: Any, size: int, carry: Any) -> tuple[Array, PyTree]:
        """(h, residuals) of every step of a stretch that is recomputed from a carry."""
        inputs, step = self.inputs(first, size), self.linear.forward

        def advance(k: Any, state: Any) -> Any:
            carry, *rows = state
            new, row = self.one(step, True, inputs, k, carry)
            return new, put(rows[0], row.outputs, k, 0), put(rows[1], row.residuals, k, 0)

        shapes = jax.eval_shape(lambda: self.one(step, True, inputs, 0, carry)[1])
        rows = (blank(a, carry.h, size, 0) for a in (shapes.outputs, shapes.residuals))
        return lax.fori_loop(0, size, advance, (carry, *rows))[1:]


class _Backward:
    """The transpose of a run."""

    def __init__(self, run: _Run, result: Result, residuals: PyTree, cotangents: Result, wanted: Differentiable):
        self.run, self.outputs, self.residuals = run, result.outputs, residuals
        self.dlast, self.doutputs = dense(cotangents.carry, result.carry), cotangents.outputs
        self.dcarries: list = [None] * len(result.carry) if cotangents.carries is None else [*cotangents.carries]
        structure: Any = jax.tree.structure(result.gates)
        gates = enumerate(structure.flatten_up_to(cotangents.gates))
        self.dgates = {n: d for n, d in gates if d is not None}
        self.tangent_params = run.product.tangent_params(run.recurrent_params)
        self.want_xs = wanted.xs
        self.want_input = any(jax.tree.leaves(steps.input_params(run.cell, wanted.params)))
        self.want_recurrent = any(jax.tree.leaves(steps.recurrent_params(wanted.params)))

    def all_chunks(self) -> Differentiable:
        run, dlast = self.run, self.dlast
        params, xs, _, reset_carry = run.differentiable
        lengths = run.constants.lengths
        zeros = functools.partial(jax.tree.map, jnp.zeros_like)
        weights = (
            run.input_params if self.want_input else None,
            run.recurrent_params if self.want_recurrent else None,
            run.units,
        )
        state = (
            dlast if lengths is None else zeros(dlast),
            zeros(reset_carry),
            # Summed over chunks and steps in at least float32.
            jax.tree.map(lambda a: jnp.zeros_like(a, jnp.promote_types(a.dtype, jnp.float32)), weights),
            jnp.zeros_like(xs) if self.want_xs else None,
        )
        state = over_chunks(self._chunk, state, run.request.steps, run.chunk_size, backward=True)
        dstart, dreset, sums, dxs = state
        dinput, drecurrent, dunits = jax.tree.map(lambda d, a: d.astype(a.dtype), sums, weights)
        if lengths is not None:
            dstart = _add(dstart, steps.at_end(lengths == 0, dlast, zeros(dlast)))
        spread = functools.partial(steps.spread_units, like=run.start.h)
        (of_units,) = jax.linear_transpose(lambda u: spread(params._replace(units=u)), params.units)(dunits)
        if dinput is not None and dinput.units:
            of_units = _add(of_units, dinput.units)
        dparams = params._replace(
            input_kernel=dinput and dinput.input_kernel, bias=dinput and dinput.bias,
            recurrent_kernel=drecurrent and drecurrent.recurrent_kernel,
            recurrent_bias=drecurrent and drecurrent.recurrent_bias, units=of_units,
        )  # fmt: skip
        return Differentiable(dparams, dxs, dstart, dreset)

    def _chunk(self, first: Any, size: int, state: Any) -> Any:
        run, linear = self.run, self.run.linear
        ds, dreset, (dinput, drecurrent, dunits), dxs = state
        before, residuals, offset, restore = self._residuals(first, size)
        inputs = run.inputs_without_xs(first, size)._replace(recurrent_params=self.tangent_params)
        xs = stretch(run.differentiable.xs, first, size, run.axis)
        slab = jax.eval_shape(run.cell.project, run.input_params, xs)

        def weights(dparams: Any, slab: Array) -> Any:
            masked_h = steps.masked(inputs.recurrent_mask, before)
            change = run.product.of_change(run.recurrent_params, dparams, masked_h)
            return run.step.add_to_tangent(slab, change)

        # From values, not from shapes: inside shard_map the rows differ over the devices as these do.
        row_shapes = jax.eval_shape(lambda *a: at(weights(*a), 0, 0), run.recurrent_params, slab)

        def back(n: Any, state: Any) -> Any:
            ds, dreset, dunits, rows = state
            k = size - 1 - n
            residual = linear.residuals(inputs, at(before, k, 0), restore(at(residuals, k + offset, 0)))
            ds, dgates = self._arriving(ds, first + k)
            now = inputs._replace(resets=at(inputs.resets, k, 0), zoneout=at(inputs.zoneout, k, 0))

            def forward(ds: Any, dreset: Any, row: Any, dunits: Any) -> Any:
                one = now._replace(xs=(residual, *row, dunits), reset_carry=dreset)
                new, gates = steps.advance(linear.tangent, run.product.tangent, one, ds)
                leaves = jax.tree.leaves(gates)
                return new, [leaves[n] for n in self.dgates]

            like = (run.start, run.differentiable.reset_carry, row_shapes, run.units)
            ds, more, row, more_units = jax.linear_transpose(forward, *like)((ds, dgates))
            return ds, _add(dreset, more), _add(dunits, more_units), put(rows, row, k, 0)

        rows = blank(row_shapes, run.start.h, size, 0)
        ds, dreset, dunits, rows = lax.fori_loop(0, size, back, (ds, dreset, dunits, rows))
        if self.want_recurrent:
            more, dslab = jax.linear_transpose(weights, run.recurrent_params, slab)(rows)
            drecurrent = _add(drecurrent, more)
        else:
            zeros = jax.tree.map(jnp.zeros_like, run.recurrent_params)
            (dslab,) = jax.linear_transpose(lambda slab: weights(zeros, slab), slab)(rows)
        if self.want_input:
            (more,) = jax.vjp(lambda params: run.cell.project(params, xs), run.input_params)[1](dslab)
            dinput = _add(dinput, more)
        if self.want_xs:
            (dx,) = jax.vjp(lambda xs: run.cell.project(run.input_params, xs), xs)[1](dslab)
            dxs = lax.dynamic_update_slice_in_dim(dxs, jnp.moveaxis(dx, 0, run.axis), first, run.axis)
        return ds, dreset, (dinput, drecurrent, dunits), dxs

    def _arriving(self, ds: Any, t: Any) -> tuple[Any, list[Array]]:
        """The cotangents of step t's carry, and of its gates those that there are."""
        lengths = self.run.constants.lengths
        if lengths is not None:
            ds = _add(ds, steps.at_end(t == lengths - 1, self.dlast, jax.tree.map(jnp.zeros_like, self.dlast)))
        pairs = zip(ds, self.dcarries, strict=True)
        ds = type(ds)(*(a if d is None else a + at(d, t, 0).astype(a.dtype) for a, d in pairs))
        if self.doutputs is not None:
            ds = ds._replace(h=ds.h + at(self.doutputs, t, self.run.axis))
        return ds, [at(d, t, 0) for d in self.dgates.values()]

    def _residuals(self, first: Any, size: int) -> tuple[Array, PyTree, Any, Callable]:
        """What the derivative needs of a stretch.

        h before every step; buffers of the rest; their row of the first step; what makes of a row the values it held.
        """
        run, recompute, reset_carry = self.run, self.run.request.recompute, self.run.differentiable.reset_carry
        resets = stretch(run.resets, first, size, 0)
        if recompute == "chunk":
            begin = at(self.residuals, first // run.chunk_size, 0)
            hs, residuals = run.rerun(first, size, begin)
            return plain.previous(begin, reset_carry, resets, hs), residuals, 0, lambda row: row
        hs = stretch(self.outputs, first, size, run.axis)
        begin = jnp.where(first > 0, at(self.outputs, jnp.maximum(first - 1, 0), run.axis), run.start.h)
        before = plain.previous(run.start._replace(h=begin), reset_carry, resets, hs)
        if recompute == "nothing":
            return before, self.residuals, first, run.restored
        inputs = run.inputs(first, size)
        masked_h = steps.masked(inputs.recurrent_mask, before)
        x, rest = run.step.add_recurrent(inputs.xs, run.product.product(run.recurrent_params, masked_h))
        carries = _with_h(run.start, run.restored(stretch(self.residuals, first, size, 0)), before)
        emitted = jax.vmap(run.linear.forward.update, (None, 0, 0, 0))(run.units, x, rest, carries)[1]
        return before, emitted[1], 0, lambda row: row


def _add(sums: PyTree, more: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums, more)


def _without_h(carry: Any) -> tuple:
    """The other fields of a carry, in their order."""
    return tuple(a for name, a in zip(carry._fields, carry, strict=True) if name != "h")


def _with_h(like: Any, others: tuple, h: Array) -> Any:
    """A carry of these fields."""
    names = [name for name in like._fields if name != "h"]
    return type(like)(**dict(zip(names, others, strict=True)), h=h)
