"""The forward run in chunks: it projects a chunk, runs, and writes the row of step t into stacks for all steps.

Inputs and outputs are read and written along any axis, so that nothing is turned to time-major as a whole.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rnncore._types import Array, PyTree
from rnncore.recurrence import recur
from rnncore.recurrence.time_buffers import at, blank, packed, put, stretch


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


class Rows(NamedTuple):
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
class Sweep:
    """A run in chunks.

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

    def inputs(self, moving: Moving, given: Given, first: Any, size: int) -> recur.Inputs:
        """The inputs of a stretch of steps, projected."""
        slab = self.project(moving.projection, stretch(moving.xs, first, size, self.axis))
        xs, _ = self.step.part(slab, None)
        resets, stay = jax.tree.map(lambda a: stretch(a, first, size, 0), (given.resets, given.stay))
        target = None if given.resets is None else moving.target
        return recur.Inputs(moving.mixing, moving.p, xs, moving.start, target, resets, given.mask, stay)

    def derivative(self, moving: Moving, given: Given) -> recur.Derivative:
        """The derivative of its steps, which keeps all that a backward run cannot form chunk by chunk."""
        return recur.Derivative(self.step, self.rules, self.inputs(moving, given, 0, 1), ("state", "folded", "input"))

    def keeping(self, derivative: recur.Derivative) -> recur.Step:
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

    def forward(self, step: recur.Step, moving: Moving, given: Given) -> tuple[Any, PyTree]:
        """((last carry, outputs, carries, emitted), what is kept for the backward run)."""
        keeping = step is not self.step

        def advance(inputs: recur.Inputs, k: Any, t: Any, state: Any) -> Any:
            carry, last, rows = state
            new, row = self._stored(step, keeping, inputs, k, carry)
            if given.lengths is not None:
                last = where(t == given.lengths - 1, new, last)
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

    def one(self, step: recur.Step, keeping: bool, inputs: recur.Inputs, k: Any, carry: Any) -> tuple[Any, Rows]:
        """Step k of a stretch: the new carry and its rows."""
        now = inputs._replace(**{name: at(getattr(inputs, name), k, 0) for name in ("xs", "resets", "stay")})
        new, emitted = recur.advance(step, self.rules, now, carry)
        emitted, kept = emitted if keeping else (emitted, None)
        return new, Rows(new.h, without_h(new) if self.states else None, emitted, kept)

    def _stored(self, step: recur.Step, keeping: bool, inputs: recur.Inputs, k: Any, carry: Any) -> tuple[Any, Rows]:
        """`one`, with what is kept in the dtype that it is kept in."""
        new, row = self.one(step, keeping, inputs, k, carry)
        if self.residual_dtype is None:
            return new, row
        return new, row._replace(kept=jax.tree.map(lambda a: packed(a, self.residual_dtype), row.kept))

    def kept_types(self, derivative: recur.Derivative, moving: Moving, given: Given) -> PyTree:
        """What is kept of a step, before it is stored."""
        inputs = self.inputs(moving, given, 0, 1)
        return self.one(self.keeping(derivative), True, inputs, 0, moving.start)[1].kept

    def _put(self, rows: Rows, row: Rows, t: Any) -> Rows:
        outputs = put(rows.outputs, row.outputs, t, self.axis)
        return Rows(outputs, *(put(a, b, t, 0) for a, b in zip(rows[1:], row[1:], strict=True)))

    def _blank(self, shapes: Rows, like: Array, steps: int) -> Rows:
        outputs = blank(shapes.outputs, like, steps, self.axis)
        return Rows(outputs, *(blank(a, like, steps, 0) for a in shapes[1:]))

    def again(self, step: recur.Step, inputs: recur.Inputs, size: int, carry: Any) -> tuple[Array, PyTree]:
        """(h, what the derivative needs) of every step of a stretch that is run again from a carry."""

        def advance(k: Any, state: Any) -> Any:
            carry, *rows = state
            new, row = self.one(step, True, inputs, k, carry)
            return new, put(rows[0], row.outputs, k, 0), put(rows[1], row.kept, k, 0)

        shapes = jax.eval_shape(lambda: self.one(step, True, inputs, 0, carry)[1])
        rows = (blank(a, carry.h, size, 0) for a in (shapes.outputs, shapes.kept))
        return lax.fori_loop(0, size, advance, (carry, *rows))[1:]


def without_h(carry: Any) -> tuple:
    """The other fields of a carry, in their order."""
    return tuple(a for name, a in zip(carry._fields, carry, strict=True) if name != "h")


def with_h(like: Any, others: tuple, h: Array) -> Any:
    """A carry of these fields."""
    names = [name for name in like._fields if name != "h"]
    return type(like)(**dict(zip(names, others, strict=True)), h=h)


def where(here: Array, new: Any, old: Any) -> Any:
    """Per sequence: `here` (*batch)."""
    return jax.tree.map(lambda a, b: jnp.where(here[..., None], a, b), new, old)
