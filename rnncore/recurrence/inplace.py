"""Reverse mode by hand: a run in chunks whose stacks are written and read where they lie.

Forward, a chunk of K steps projects its inputs and runs (`sweep.py`); what the derivative needs of step
t goes into row t of a stack for all steps.  Backward, the chunks are taken from the last to the first: a
loop transposes the linearised step L_t (`recur.Derivative`) and writes the cotangents of the chunk's
pre-activations into one slab, and then

  dU += entering^T slab,   dW += x^T slab,   db += sum slab,   dx = slab W^T

once a chunk.  A `lax.scan` over chunks would copy every chunk out of its stack and back.  First order
only; every other mode is `recur.run`'s.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from rnncore import _compat
from rnncore._types import Array, PyTree
from rnncore.recurrence import recur
from rnncore.recurrence.sweep import Given, Moving, Sweep, where, with_h
from rnncore.recurrence.time_buffers import at, blank, put, stretch, unpacked


def run(sweep: Sweep, moving: Moving, given: Given) -> tuple[Any, Array, Any, PyTree]:
    """(last carry, outputs, carries or None, emitted)."""
    made: dict[str, Any] = {}  # what `forward` works out when it is traced, for `backward`

    @jax.custom_vjp
    def whole(moving: Moving, given: Given) -> Any:
        return sweep.forward(sweep.step, moving, given)[0]

    def forward(moving: Moving, given: Given) -> Any:
        made["precision"] = _compat.matmul_precision()
        made["derivative"] = derivative = sweep.derivative(moving, given)
        results, kept = sweep.forward(sweep.keeping(derivative), moving, given)
        return results, (moving, given, None if sweep.recompute == "chunk" else results[1], kept)

    def backward(held: Any, cotangents: Any) -> Any:
        # The precision that the caller set for the model holds for its gradient too.
        with jax.default_matmul_precision(made["precision"]):
            return _Backward(sweep, made["derivative"], *held)(*cotangents), None

    whole.defvjp(forward, backward)
    return whole(moving, given)


class _Backward:
    """The transpose of a sweep."""

    def __init__(
        self, sweep: Sweep, derivative: recur.Derivative, moving: Moving, given: Given, outputs: Array | None, kept: Any
    ):
        self.sweep, self.derivative, self.moving, self.given = sweep, derivative, moving, given
        self.outputs, self.kept = outputs, kept
        self.mixing = sweep.rules.tangent_mixing(moving.mixing)
        self.types = jax.eval_shape(lambda: sweep.kept_types(derivative, moving, given))

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
        dstart, dtarget, sums, dxs = self.sweep.over_chunks(chunk, state, backward=True)
        weights = (moving.projection, moving.mixing, moving.p)
        dprojection, dmixing, dp = jax.tree.map(lambda d, a: d.astype(a.dtype), sums, weights)
        if given.lengths is not None:
            dstart = _add(dstart, where(given.lengths == 0, dlast, zeros(dlast)))
        return Moving(dprojection, dmixing, dp, dxs, dstart, dtarget if resetting else zeros(moving.target))

    def _chunk(self, dlast: Any, cotangents: Any, first: Any, size: int, state: Any) -> Any:
        sweep, moving, derivative = self.sweep, self.moving, self.derivative
        ds, dtarget, (dprojection, dmixing, dp), dxs = state
        before, kept, offset, restore = self._residuals(first, size)
        resets, stay = jax.tree.map(lambda a: stretch(a, first, size, 0), (self.given.resets, self.given.stay))
        inputs = recur.Inputs(self.mixing, moving.p, None, moving.start, moving.target, resets, self.given.mask, stay)
        xs = stretch(moving.xs, first, size, sweep.axis)
        slab = jax.eval_shape(sweep.project, moving.projection, xs)

        def weights(dmixing: Any, slab: Array) -> Any:
            return sweep.step.fold_tangent(slab, sweep.rules.mix(dmixing, inputs.entering(before)))

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
                return recur.advance(derivative.tangent, sweep.rules.tangent, one, ds)

            linear = (moving.start, None if dtarget is None else moving.target, row_shapes, moving.p)
            ds, more, row, more_p = jax.linear_transpose(forward, *linear)((ds, demitted))
            return ds, _add(dtarget, more), _add(dp, more_p), put(rows, row, k, 0)

        rows = blank(row_shapes, moving.start.h, size, 0)
        ds, dtarget, dp, rows = lax.fori_loop(0, size, back, (ds, dtarget, dp, rows))
        more_mixing, slab = jax.linear_transpose(weights, moving.mixing, slab)(rows)
        more_projection, dx = jax.vjp(sweep.project, moving.projection, xs)[1](slab)
        sums = _add((dprojection, dmixing), (more_projection, more_mixing))
        dxs = lax.dynamic_update_slice_in_dim(dxs, jnp.moveaxis(dx, 0, sweep.axis), first, sweep.axis)
        return ds, dtarget, (*sums, dp), dxs

    def _arriving(self, ds: Any, dlast: Any, cotangents: Any, t: Any) -> tuple[Any, Any]:
        """The cotangents of step t's carry and of what it emitted."""
        doutputs, dcarries, demitted = cotangents
        if self.given.lengths is not None:
            here = where(t == self.given.lengths - 1, dlast, jax.tree.map(jnp.zeros_like, dlast))
            ds = _add(ds, here)
        if dcarries is not None:
            ds = _add(ds, at(dcarries, t, 0))
        return ds._replace(h=ds.h + at(doutputs, t, self.sweep.axis)), at(demitted, t, 0)

    def _residuals(self, first: Any, size: int) -> tuple[Array, PyTree, Any, Callable]:
        """What the derivative needs of a stretch.

        h before every step; stacks of the rest; their row of the first step; what makes of a row the values it held.
        """
        sweep, moving, given = self.sweep, self.moving, self.given

        def restored(rows: PyTree) -> PyTree:
            if sweep.residual_dtype is None:
                return rows
            return jax.tree.map(lambda a, b: unpacked(a, sweep.residual_dtype).astype(b.dtype), rows, self.types)

        if sweep.recompute == "chunk":
            begin = at(self.kept, first // sweep.every, 0)
            inputs = sweep.inputs(moving, given, first, size)
            hs, kept = sweep.again(self.derivative.forward, inputs, size, begin)
            return _reset(inputs, _shifted(begin.h, hs)), kept, 0, lambda row: row
        hs = stretch(self.outputs, first, size, sweep.axis)
        begin = jnp.where(first > 0, at(self.outputs, jnp.maximum(first - 1, 0), sweep.axis), moving.start.h)
        if sweep.recompute == "nothing":
            resets = stretch(given.resets, first, size, 0)
            inputs = recur.Inputs(None, None, None, None, moving.target, resets)
            return _reset(inputs, _shifted(begin, hs)), self.kept, first, restored
        inputs = sweep.inputs(moving, given, first, size)
        before = _reset(inputs, _shifted(begin, hs))
        x, rest = sweep.step.fold(inputs.xs, sweep.rules.mix(moving.mixing, inputs.entering(before)))
        carries = with_h(moving.start, restored(stretch(self.kept, first, size, 0)), before)
        emitted = jax.vmap(self.derivative.forward.run, (None, 0, 0, 0))(moving.p, x, rest, carries)[1]
        return before, emitted[1], 0, lambda row: row


def _sum_dtype(a: Array) -> Any:
    return jnp.promote_types(a.dtype, jnp.float32)


def _add(sums: PyTree, more: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums, more)


def _reset(inputs: recur.Inputs, before: Array) -> Array:
    return before if inputs.resets is None else jnp.where(inputs.resets, inputs.target.h, before)


def _shifted(begin: Array, hs: Array) -> Array:
    """What came before each of hs, which are time-major."""
    return jnp.concatenate([begin[None], hs[:-1]])
