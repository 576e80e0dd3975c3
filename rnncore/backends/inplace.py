"""Reverse mode by hand: a run in chunks whose stacks are written and read where they lie.

Forward, a chunk of K steps projects its inputs and runs; what the derivative needs of step t goes
into row t of a stack for all steps.  Backward, the chunks are taken from the last to the first: a loop
transposes the linearised step L_t (`recur.Derivative`) and writes the cotangents of the chunk's
pre-activations into one slab, and then

  dU += entering^T slab,   dW += x^T slab,   db += sum slab,   dx = slab W^T

once a chunk.  A `lax.scan` over chunks would copy every chunk out of its stack and back.  Inputs and
outputs are read and written along any axis, so that nothing is turned to time-major as a whole.
First order only; every other mode is `recur.run`'s.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rnncore import _compat
from rnncore._types import Array, PyTree
from rnncore.backends import recur


class Moving(NamedTuple):
    """What a run is differentiated with respect to.

    Fields:
      projection, mixing: parameters of `project` and of `mix`.
      p: per-unit parameters, broadcast to (*batch, H).
      xs: inputs, with time along `axis`.
      start, target: the carry before the first step, and the one that resets return to.
    """

    projection: PyTree
    mixing: PyTree
    p: PyTree
    xs: Array
    start: Any
    target: Any


class Given(NamedTuple):
    """What it depends on besides: see `Operands`."""

    lengths: Array | None
    resets: Array | None
    mask: Array | None
    stay: Any


class _Rows(NamedTuple):
    """Stacks over time, or one row of each.

    Fields:
      outputs: h.
      carries: the other fields of the carry, where states are wanted.
      emitted: what the step emits.
      kept: what the backward run needs.
    """

    outputs: Any
    carries: Any
    emitted: Any
    kept: Any


@dataclasses.dataclass(frozen=True)
class Run:
    """A run in chunks, and its transpose.

    Fields:
      project: (projection, xs of any leading axes) -> slab of pre-activations.
      step, rules: the recurrence; `step.part` makes of a slab what the step reads.
      steps, every: T and K.
      axis: where time lies in inputs and outputs.
      states: whether all carries are wanted.
      recompute, residual_dtype: see `rnncore.unroll`.
    """

    project: Callable
    step: recur.Step
    rules: recur.Rules
    steps: int
    every: int
    axis: int
    states: bool
    recompute: str
    residual_dtype: str | None = None

    def __call__(self, moving: Moving, given: Given) -> tuple[Any, Array, Any, PyTree]:
        """(last carry, outputs, carries or None, emitted)."""
        made: dict[str, Any] = {}  # what `forward` works out when it is traced, for `backward`

        @jax.custom_vjp
        def run(moving: Moving, given: Given) -> Any:
            return self._forward(self.step, moving, given)[0]

        def forward(moving: Moving, given: Given) -> Any:
            made["precision"] = _compat.matmul_precision()
            made["derivative"] = derivative = self._derivative(moving, given)
            results, kept = self._forward(self._keeping(derivative), moving, given)
            return results, (moving, given, None if self.recompute == "chunk" else results[1], kept)

        def backward(held: Any, cotangents: Any) -> Any:
            # The precision that the caller set for the model holds for its gradient too.
            with jax.default_matmul_precision(made["precision"]):
                return _Backward(self, made["derivative"], *held)(*cotangents), None

        run.defvjp(forward, backward)
        return run(moving, given)

    # ------------------------------------------------------------------------------------ parts

    def inputs(self, moving: Moving, given: Given, first: Any, size: int) -> recur.Inputs:
        """The inputs of a stretch of steps, projected."""
        slab = self.project(moving.projection, stretch(moving.xs, first, size, self.axis))
        xs, _ = self.step.part(slab, None)
        resets, stay = jax.tree.map(lambda a: stretch(a, first, size, 0), (given.resets, given.stay))
        target = None if given.resets is None else moving.target
        return recur.Inputs(moving.mixing, moving.p, xs, moving.start, target, resets, given.mask, stay)

    def _derivative(self, moving: Moving, given: Given) -> recur.Derivative:
        return recur.Derivative(self.step, self.rules, self.inputs(moving, given, 0, 1), ("state", "folded", "input"))

    def _keeping(self, derivative: recur.Derivative) -> recur.Step:
        """The step that also emits what the backward run needs of it."""
        if self.recompute == "nothing":
            return derivative.forward

        def run(p: Any, x: Any, rest: Any, s: Any) -> Any:
            new, emitted = self.step.run(p, x, rest, s)
            return new, (emitted, without_h(s) if self.recompute == "gates" else None)

        return dataclasses.replace(self.step, run=run)

    def over_chunks(self, chunk: Callable[[Any, int, Any], Any], state: Any, backward: bool = False) -> Any:
        """`chunk` (first step, size, state) -> state over all of them, in order or from the last to the first."""
        count, left = divmod(self.steps, self.every)
        order: list[tuple[int | None, int]] = [(None, self.every)] if count > 1 else [(0, self.every)] * count
        order += [(count, left)] if left else []
        for n, size in reversed(order) if backward else order:
            if n is None:

                def one(i: Any, state: Any) -> Any:
                    return chunk((count - 1 - i if backward else i) * self.every, self.every, state)

                state = lax.fori_loop(0, count, one, state)
            else:
                state = chunk(n * self.every, size, state)
        return state

    # ---------------------------------------------------------------------------------- forward

    def _forward(self, step: recur.Step, moving: Moving, given: Given) -> tuple[Any, PyTree]:
        """((last carry, outputs, carries, emitted), what is kept for the backward run)."""
        keeping = step is not self.step

        def advance(inputs: recur.Inputs, k: Any, t: Any, state: Any) -> Any:
            carry, last, rows = state
            new, row = self._stored(step, keeping, inputs, k, carry)
            if given.lengths is not None:
                last = _where(t == given.lengths - 1, new, last)
            return new, last, self._put(rows, row, t)

        def chunk(first: Any, size: int, state: Any) -> Any:
            (carry, last, rows), begins = state
            if begins is not None:
                begins = put(begins, carry, first // self.every, 0)
            inputs = self.inputs(moving, given, first, size)
            return lax.fori_loop(0, size, lambda k, s: advance(inputs, k, first + k, s), (carry, last, rows)), begins

        carry = moving.start
        shapes = jax.eval_shape(lambda: self._stored(step, keeping, self.inputs(moving, given, 0, 1), 0, carry)[1])
        rows = self._blank(shapes, carry.h, self.steps)
        begins = None
        if keeping and self.recompute == "chunk":
            begins = blank(carry, carry.h, math.ceil(self.steps / self.every), 0)
        (carry, last, rows), begins = self.over_chunks(chunk, ((carry, carry, rows), begins))
        carries = None
        if self.states:
            carries = with_h(carry, rows.carries, jnp.moveaxis(rows.outputs, self.axis, 0))
        results = (carry if given.lengths is None else last, rows.outputs, carries, rows.emitted)
        return results, rows.kept if begins is None else begins

    def one(self, step: recur.Step, keeping: bool, inputs: recur.Inputs, k: Any, carry: Any) -> tuple[Any, _Rows]:
        """Step k of a stretch: the new carry and its rows."""
        now = inputs._replace(**{name: at(getattr(inputs, name), k, 0) for name in ("xs", "resets", "stay")})
        new, emitted = recur.advance(step, self.rules, now, carry)
        emitted, kept = emitted if keeping else (emitted, None)
        return new, _Rows(new.h, without_h(new) if self.states else None, emitted, kept)

    def _stored(self, step: recur.Step, keeping: bool, inputs: recur.Inputs, k: Any, carry: Any) -> tuple[Any, _Rows]:
        """`one`, with what is kept in the dtype that it is kept in."""
        new, row = self.one(step, keeping, inputs, k, carry)
        if self.residual_dtype is None:
            return new, row
        return new, row._replace(kept=jax.tree.map(lambda a: packed(a, self.residual_dtype), row.kept))

    def kept_types(self, derivative: recur.Derivative, moving: Moving, given: Given) -> PyTree:
        """What is kept of a step, before it is stored."""
        inputs = self.inputs(moving, given, 0, 1)
        return self.one(self._keeping(derivative), True, inputs, 0, moving.start)[1].kept

    def _put(self, rows: _Rows, row: _Rows, t: Any) -> _Rows:
        outputs = put(rows.outputs, row.outputs, t, self.axis)
        return _Rows(outputs, *(put(a, b, t, 0) for a, b in zip(rows[1:], row[1:], strict=True)))

    def _blank(self, shapes: _Rows, like: Array, steps: int) -> _Rows:
        outputs = blank(shapes.outputs, like, steps, self.axis)
        return _Rows(outputs, *(blank(a, like, steps, 0) for a in shapes[1:]))

    def again(self, step: recur.Step, inputs: recur.Inputs, size: int, carry: Any) -> tuple[Array, PyTree]:
        """(h, what the derivative needs) of every step of a stretch that is run again from a carry."""

        def advance(k: Any, state: Any) -> Any:
            carry, *rows = state
            new, row = self.one(step, True, inputs, k, carry)
            return new, put(rows[0], row.outputs, k, 0), put(rows[1], row.kept, k, 0)

        shapes = jax.eval_shape(lambda: self.one(step, True, inputs, 0, carry)[1])
        rows = (blank(a, carry.h, size, 0) for a in (shapes.outputs, shapes.kept))
        return lax.fori_loop(0, size, advance, (carry, *rows))[1:]


class _Backward:
    """The transpose of a run."""

    def __init__(
        self, run: Run, derivative: recur.Derivative, moving: Moving, given: Given, outputs: Array | None, kept: Any
    ):
        self.run, self.derivative, self.moving, self.given = run, derivative, moving, given
        self.outputs, self.kept = outputs, kept
        self.mixing = run.rules.tangent_mixing(moving.mixing)
        self.types = jax.eval_shape(lambda: run.kept_types(derivative, moving, given))

    def __call__(self, dlast: Any, doutputs: Array, dcarries: Any, demitted: Any) -> Moving:
        moving, given = self.moving, self.given
        zeros = functools.partial(jax.tree.map, jnp.zeros_like)
        cotangents = (doutputs, dcarries, demitted)
        resetting = given.resets is not None
        state = (
            dlast if given.lengths is None else zeros(dlast),
            zeros(moving.target) if resetting else None,
            # Summed over chunks and steps in float32 where the parameters have less.
            jax.tree.map(lambda a: jnp.zeros_like(a, _sum_dtype(a)), (moving.projection, moving.mixing, moving.p)),
            zeros(moving.xs),
        )
        chunk = functools.partial(self._chunk, dlast, cotangents)
        dstart, dtarget, sums, dxs = self.run.over_chunks(chunk, state, backward=True)
        weights = (moving.projection, moving.mixing, moving.p)
        dprojection, dmixing, dp = jax.tree.map(lambda d, a: d.astype(a.dtype), sums, weights)
        if given.lengths is not None:
            dstart = _add(dstart, _where(given.lengths == 0, dlast, zeros(dlast)))
        return Moving(dprojection, dmixing, dp, dxs, dstart, dtarget if resetting else zeros(moving.target))

    def _chunk(self, dlast: Any, cotangents: Any, first: Any, size: int, state: Any) -> Any:
        run, moving, derivative = self.run, self.moving, self.derivative
        ds, dtarget, (dprojection, dmixing, dp), dxs = state
        before, kept, offset, restore = self._residuals(first, size)
        resets, stay = jax.tree.map(lambda a: stretch(a, first, size, 0), (self.given.resets, self.given.stay))
        inputs = recur.Inputs(self.mixing, moving.p, None, moving.start, moving.target, resets, self.given.mask, stay)
        xs = stretch(moving.xs, first, size, run.axis)
        slab = jax.eval_shape(run.project, moving.projection, xs)

        def weights(dmixing: Any, slab: Array) -> Any:
            return run.step.fold_tangent(slab, run.rules.mix(dmixing, inputs.entering(before)))

        # From values, not from shapes: inside shard_map the rows differ over the devices as these do.
        row_shapes = jax.eval_shape(lambda *a: at(weights(*a), 0, 0), moving.mixing, slab)

        def back(n: Any, state: Any) -> Any:
            ds, dtarget, dp, rows = state
            k = size - 1 - n
            residual = derivative.residuals(inputs, at(before, k, 0), restore(at(kept, k + offset, 0)))
            ds, demitted = self._arriving(ds, dlast, cotangents, first + k)
            now = inputs._replace(resets=at(inputs.resets, k, 0), stay=at(inputs.stay, k, 0))

            def forward(ds: Any, dtarget: Any, row: Any, dp: Any) -> Any:
                one = now._replace(xs=(residual, *row, dp), target=dtarget)
                return recur.advance(derivative.tangent, run.rules.tangent, one, ds)

            linear = (moving.start, None if dtarget is None else moving.target, row_shapes, moving.p)
            ds, more, row, more_p = jax.linear_transpose(forward, *linear)((ds, demitted))
            return ds, _add(dtarget, more), _add(dp, more_p), put(rows, row, k, 0)

        rows = blank(row_shapes, moving.start.h, size, 0)
        ds, dtarget, dp, rows = lax.fori_loop(0, size, back, (ds, dtarget, dp, rows))
        more_mixing, slab = jax.linear_transpose(weights, moving.mixing, slab)(rows)
        more_projection, dx = jax.vjp(run.project, moving.projection, xs)[1](slab)
        sums = _add((dprojection, dmixing), (more_projection, more_mixing))
        dxs = lax.dynamic_update_slice_in_dim(dxs, jnp.moveaxis(dx, 0, run.axis), first, run.axis)
        return ds, dtarget, (*sums, dp), dxs

    def _arriving(self, ds: Any, dlast: Any, cotangents: Any, t: Any) -> tuple[Any, Any]:
        """The cotangents of step t's carry and of what it emitted."""
        doutputs, dcarries, demitted = cotangents
        if self.given.lengths is not None:
            here = _where(t == self.given.lengths - 1, dlast, jax.tree.map(jnp.zeros_like, dlast))
            ds = _add(ds, here)
        if dcarries is not None:
            ds = _add(ds, at(dcarries, t, 0))
        return ds._replace(h=ds.h + at(doutputs, t, self.run.axis)), at(demitted, t, 0)

    def _residuals(self, first: Any, size: int) -> tuple[Array, PyTree, Any, Callable]:
        """What the derivative needs of a stretch.

        h before every step; stacks of the rest; their row of the first step; what makes of a row the values it held.
        """
        run, moving, given = self.run, self.moving, self.given

        def restored(rows: PyTree) -> PyTree:
            if run.residual_dtype is None:
                return rows
            return jax.tree.map(lambda a, b: unpacked(a, run.residual_dtype).astype(b.dtype), rows, self.types)

        if run.recompute == "chunk":
            begin = at(self.kept, first // run.every, 0)
            inputs = run.inputs(moving, given, first, size)
            hs, kept = run.again(self.derivative.forward, inputs, size, begin)
            return _reset(inputs, shifted(begin.h, hs)), kept, 0, lambda row: row
        hs = stretch(self.outputs, first, size, run.axis)
        begin = jnp.where(first > 0, at(self.outputs, jnp.maximum(first - 1, 0), run.axis), moving.start.h)
        if run.recompute == "nothing":
            resets = stretch(given.resets, first, size, 0)
            inputs = recur.Inputs(None, None, None, None, moving.target, resets)
            return _reset(inputs, shifted(begin, hs)), self.kept, first, restored
        inputs = run.inputs(moving, given, first, size)
        before = _reset(inputs, shifted(begin, hs))
        x, rest = run.step.fold(inputs.xs, run.rules.mix(moving.mixing, inputs.entering(before)))
        carries = with_h(moving.start, restored(stretch(self.kept, first, size, 0)), before)
        emitted = jax.vmap(self.derivative.forward.run, (None, 0, 0, 0))(moving.p, x, rest, carries)[1]
        return before, emitted[1], 0, lambda row: row


def _sum_dtype(a: Array) -> Any:
    return jnp.promote_types(a.dtype, jnp.float32)


def _add(sums: PyTree, more: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums, more)


def _reset(inputs: recur.Inputs, before: Array) -> Array:
    return before if inputs.resets is None else jnp.where(inputs.resets, inputs.target.h, before)


def shifted(begin: Array, hs: Array) -> Array:
    """What came before each of hs, which are time-major."""
    return jnp.concatenate([begin[None], hs[:-1]])


def without_h(carry: Any) -> tuple:
    """The other fields of a carry, in their order."""
    return tuple(a for name, a in zip(carry._fields, carry, strict=True) if name != "h")


def with_h(like: Any, others: tuple, h: Array) -> Any:
    """A carry of these fields."""
    names = [name for name in like._fields if name != "h"]
    return type(like)(**dict(zip(names, others, strict=True)), h=h)


def _where(here: Array, new: Any, old: Any) -> Any:
    """Per sequence: `here` (*batch)."""
    return jax.tree.map(lambda a, b: jnp.where(here[..., None], a, b), new, old)


# Stacks along an axis; trees of them, None among the leaves.


def stretch(tree: PyTree, first: Any, size: int, axis: int) -> PyTree:
    """Rows first to first + size, brought to the front."""
    return jax.tree.map(lambda a: jnp.moveaxis(lax.dynamic_slice_in_dim(a, first, size, axis), axis, 0), tree)


def at(tree: PyTree, t: Any, axis: int) -> PyTree:
    """Row t."""
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, t, axis, keepdims=False), tree)


def put(tree: PyTree, rows: PyTree, t: Any, axis: int) -> PyTree:
    """The stacks with these rows as row t."""
    return jax.tree.map(lambda a, row: lax.dynamic_update_index_in_dim(a, row, t, axis), tree, rows)


def packed(a: Array, dtype: Any) -> Array:
    """The bits of the values in a dtype, as integers: on a CPU XLA turns whole stacks of bfloat16 to float32."""
    return lax.bitcast_convert_type(a.astype(dtype), f"uint{8 * jnp.dtype(dtype).itemsize}")


def unpacked(bits: Array, dtype: Any) -> Array:
    """The values that `packed` was given, in the dtype."""
    return lax.bitcast_convert_type(bits, dtype)


def blank(shapes: PyTree, like: Array, steps: int, axis: int) -> PyTree:
    """Stacks of zeros for rows of these shapes, on the devices of `like`, which is (*batch, H)."""

    def one(row: Any) -> Array:
        # From the data, not from nothing: inside shard_map and on explicit meshes it is spread as they are.
        zero = jnp.zeros_like(like[..., :1]).astype(row.dtype)
        zero = jnp.broadcast_to(zero, (*zero.shape[:-1], row.shape[-1]))
        return jnp.repeat(jnp.expand_dims(zero, axis), steps, axis)

    return jax.tree.map(one, shapes)
