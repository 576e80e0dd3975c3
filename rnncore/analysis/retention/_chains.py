"""Products of step Jacobians with given rows or columns, no Jacobian ever formed, measured on the way.

A block of m vectors goes through the steps one by one, is brought back to size after each, and the
power of two that was taken out is kept.  With the identity as the block this costs what the product
of formed Jacobians costs; with a single vector next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rnncore._types import Array
from rnncore.analysis.jacobians.products import LN2, renormalise
from rnncore.analysis.run.flat import Through, columns_through, flat, rows_through
from rnncore.analysis.run.trajectory import Trajectory

Measure = Callable[[Array, Any], Array]
"""(block (B, m, n), what belongs to this step) to the ln of a norm, (B,)."""


def pull_back(traj: Trajectory, rows: Array, measure: Measure, beside: Any, lags: Sequence[int]) -> Array:
    """Measures rows P_k = rows J_T ... J_{T-k+1} at the lags.

    Args:
      rows: (B, m, n), the block at the last step.
      measure: the norm to take.
      beside: arrays (T + 1, B, ...) of which `measure` gets entry T - k; or None.
      lags: increasing.

    Returns:
      (len(lags), B), natural logarithms.
    """
    last, run = traj.steps, flat(traj)
    backwards = slice(last - lags[-1], last)
    now = jax.tree.map(lambda a: jnp.flip(a[backwards], 0), (*run.now, beside))
    return _measured(rows_through(run.step), rows, measure, jax.tree.map(lambda a: a[last], beside), now, lags)


def push_forward(traj: Trajectory, columns: Array, measure: Measure, lags: Sequence[int], start: int = 0) -> Array:
    """Measures J_{start+k} ... J_{start+1} columns at the lags k.

    Args:
      columns: (B, m, n), the m columns at the start, one a row.
      measure: the norm to take; gets the columns as rows too.
      lags: increasing.
      start: the step from which to go on.

    Returns:
      (len(lags), B), natural logarithms.
    """
    run, forwards = flat(traj), slice(start, start + lags[-1])
    now = jax.tree.map(lambda a: a[forwards], (*run.now, None))
    return _measured(columns_through(run.step), columns, measure, None, now, lags)


def carry_block(through: Through, block: Array, now: Any) -> tuple[Array, Array]:
    """A block (B, m, n) after all of the steps (state, inputs), and the power of two (B,) that was taken out of it."""

    def step(carry: Any, now: Any) -> Any:
        block, exponent = carry
        return renormalise(jax.vmap(through)(*now, block), exponent), None

    with jax.default_matmul_precision("highest"):
        carry, _ = jax.lax.scan(step, renormalise(block, jnp.zeros(block.shape[:1], jnp.int32)), now)
    return carry


def _measured(through: Through, block: Array, measure: Measure, beside: Any, now: Any, lags: Sequence[int]) -> Array:
    """The loop over steps; norms are taken at the wanted lags only, some of them are dear."""
    wanted = np.isin(np.arange(1, lags[-1] + 1), lags)

    def log_norm(block: Array, exponent: Array, beside: Any) -> Array:
        return measure(block, beside) + exponent * LN2

    def step(carry: Any, now: Any) -> Any:
        block, exponent = carry
        (state, inputs, beside), want = now
        block, exponent = renormalise(jax.vmap(through)(state, inputs, block), exponent)
        nothing = jnp.zeros(exponent.shape, block.dtype)
        value = jax.lax.cond(want, lambda: log_norm(block, exponent, beside), lambda: nothing)
        return (block, exponent), value

    with jax.default_matmul_precision("highest"):
        carry = renormalise(block, jnp.zeros(block.shape[:1], jnp.int32))
        first = log_norm(*carry, beside)
        _, rest = jax.lax.scan(step, carry, (now, jnp.asarray(wanted)))
    return jnp.concatenate([first[None], rest])[np.asarray(lags)]
