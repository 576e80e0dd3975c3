"""Products of step Jacobians with given rows or columns, measured along the way; no Jacobian is formed.

A block of m vectors goes through the steps one by one and is rescaled after each by a power of two, which
is recorded.  With the identity as the block this costs as much as the product of the Jacobians; with a
single vector next to nothing.

Over many steps the rows of a block collapse onto the few directions that survive.  The norms do not change
when the block is multiplied by an orthogonal matrix from the left, so from time to time the block is replaced
by one with as many rows as directions are left, if no row loses more than rounding has taken already.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rnncore._types import Array
from rnncore.analysis.jacobians.products import nats, renormalise
from rnncore.analysis.run.flat import Through, columns_through, flat, rows_through
from rnncore.analysis.run.trajectory import Trajectory

Measure = Callable[[Array, Any], Array]
"""(block (B, m, n), arrays of this step) to the ln of a norm, (B,); the same for Q block, Q orthogonal."""
Make = Callable[[Trajectory], Measure]
"""From a run to the measure: a module-level function or a partial of one, so that nothing compiles twice."""
FIRST, LADDER = 64, (16, 48, 128, 256)
"""Steps until a block is first reduced, then twice as many each time; the numbers of rows it may be reduced to."""
KEPT = 8.0
"""Times eps: the part of the length of a row that may be lost with a direction."""


def pull_back(traj: Trajectory, rows: Array, make: Make, beside: Any, lags: Sequence[int]) -> Array:
    """Measures rows P_k = rows J_T ... J_{T-k+1} at the lags.

    Args:
      rows: (B, m, n), the block at the last step.
      make: what to measure.
      beside: arrays (T + 1, B, ...) of which the measure gets entry T - k; or None.
      lags: increasing.

    Returns:
      (len(lags), B), natural logarithms.
    """
    last = traj.steps
    backwards = slice(last - lags[-1], last)
    now = jax.tree.map(lambda a: jnp.flip(a[backwards], 0), (*_now(traj), beside))
    return _measured(traj, rows_through, rows, make, jax.tree.map(lambda a: a[last], beside), now, lags)


def push_forward(traj: Trajectory, columns: Array, make: Make, lags: Sequence[int], start: int = 0) -> Array:
    """Measures J_{start+k} ... J_{start+1} columns at the lags k.

    Args:
      columns: (B, m, n), the m columns at the start, one a row.
      make: what to measure; it gets the columns as rows too.
      lags: increasing.
      start: the step from which to go on.

    Returns:
      (len(lags), B), natural logarithms.
    """
    forwards = slice(start, start + lags[-1])
    now = jax.tree.map(lambda a: a[forwards], (*_now(traj), None))
    return _measured(traj, columns_through, columns, make, None, now, lags)


@jax.jit
def _now(traj: Trajectory) -> Any:
    return flat(traj).now


def carry_block(through: Through, block: Array, now: Any) -> tuple[Array, Array]:
    """A block (B, m, n) after all of the steps (state, inputs), and the power of two (B,) that was taken out of it."""

    def step(carry: Any, now: Any) -> Any:
        block, exponent = carry
        return renormalise(jax.vmap(through)(*now, block), exponent), None

    with jax.default_matmul_precision("highest"):
        carry, _ = jax.lax.scan(step, renormalise(block, jnp.zeros(block.shape[:1], jnp.int32)), now)
    return carry


def _measured(
    traj: Trajectory, direction: Callable[[Any], Through], block: Array, make: Make, beside: Any, now: Any,
    lags: Sequence[int],
) -> Array:  # fmt: skip
    """The loop over steps; norms, some of them expensive, are taken at the wanted lags only."""
    steps = lags[-1]
    stretches = _stretches(block, steps)
    # Pieces of one size compile once for each number of rows; what lies beyond the last step is cut off.
    size = FIRST if len(stretches) > 1 else steps
    now = jax.tree.map(lambda a: jnp.pad(a, [(0, -steps % max(size, 1))] + [(0, 0)] * (a.ndim - 1), "edge"), now)
    wanted = jnp.asarray(np.isin(np.arange(1, steps + max(size, 1)), lags))
    with jax.default_matmul_precision("highest"):
        state = renormalise(block, jnp.zeros(block.shape[:1], jnp.int32))
        logs = [(make(traj)(state[0], beside) + nats(state[1], state[0].dtype))[None]]
        for first, after in stretches:
            for begin in range(first, after, size):
                state, values = _stretch(traj, state, (now, wanted), begin, direction, make, size)
                logs.append(values)
            if after < steps:
                state = (_fewer_rows(state[0]), state[1])
    return jnp.concatenate(logs)[np.asarray(lags)]


def _stretches(block: Array, steps: int) -> list[tuple[int, int]]:
    """(first, one after the last step) of stretches that double in length; a single one where rows are few."""
    if isinstance(block, jax.core.Tracer) or block.shape[-2] <= LADDER[0] or steps <= 2 * FIRST:
        return [(0, steps)] if steps else []
    ends = [0, FIRST]
    while ends[-1] < steps:
        ends.append(min(steps, ends[-1] + min(ends[-1], 8 * FIRST)))
    return list(zip(ends[:-1], ends[1:], strict=True))


@functools.partial(jax.jit, static_argnames=("direction", "make", "size"))
def _stretch(traj: Trajectory, state: Any, now: Any, begin: Any, direction: Any, make: Make, size: int) -> Any:
    """((block, exponent) after `size` steps from `begin` on, what was measured after each)."""
    now = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, begin, size), now)
    through, measure = direction(flat(traj).step), make(traj)

    def step(state: Any, now: Any) -> Any:
        block, exponent = state
        (before, inputs, beside), want = now
        block, exponent = renormalise(jax.vmap(through)(before, inputs, block), exponent)

        def measured(block: Array = block, exponent: Array = exponent) -> Array:
            return measure(block, beside) + nats(exponent, block.dtype)

        nothing = jnp.zeros(exponent.shape, jax.eval_shape(measured).dtype)
        value = jax.lax.cond(want, measured, lambda: nothing)
        return (block, exponent), value

    return jax.lax.scan(step, state, now)


def _fewer_rows(block: Array) -> Array:
    """Q block with fewer rows, Q orthogonal, if every row lies in the span of few directions up to rounding."""
    rows = np.asarray(block, np.float64)  # in NumPy: float32 would round away what decides
    _, m, n = rows.shape
    rounding = KEPT * float(jnp.finfo(block.dtype).eps) * np.linalg.norm(rows, axis=-1)
    draw, turned = np.random.default_rng(0), np.swapaxes(rows, -1, -2)
    for fewer in (r for r in LADDER if r < min(m, n)):
        # Random sums of the rows span the same space if it is small enough; two more rounds for the small rows.
        directions, _ = np.linalg.qr(turned @ draw.normal(size=(m, fewer)))
        for _ in range(2):
            directions, _ = np.linalg.qr(turned @ (rows @ directions))
        within = rows @ directions
        if np.all(np.linalg.norm(rows - within @ np.swapaxes(directions, -1, -2), axis=-1) <= rounding):
            # Rotated at random, so that each row again has a part in every direction.
            turn, _ = np.linalg.qr(draw.normal(size=(fewer, fewer)))
            return jnp.asarray(turn @ np.linalg.qr(within, mode="r") @ np.swapaxes(directions, -1, -2), block.dtype)
    return block
