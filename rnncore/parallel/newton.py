"""Newton's method for all states of a run at once, and its exact derivatives.

  F_t(s) = f(s_{t-1}, x_t) - s_t = 0,   s' = s + u,   u_t = J_t u_{t-1} + F_t,   J_t = d f / d s_{t-1}

After k iterations the first k states are exact for any initial guess, so an update may be modified safely: where the
full update does not reduce the residual, every state is clipped to the range of the values that the steps have
given.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rnncore._types import Array
from rnncore.cells.diagonals import Diagonals
from rnncore.parallel.sweep import Operands, Sweep


class Found(NamedTuple):
    """The result of the iteration.

    Fields:
      states: carry of (T, *batch, H) arrays.
      iterations: (T, *batch) int32, after how many the residuals up to this step were below the tolerance for good, or
        how many there were.
      residual: (*batch), the largest |f(s_{t-1}, x_t) - s_t| / max(1, |f(s_{t-1}, x_t)|).
    """

    states: Any
    iterations: Array
    residual: Array


@dataclasses.dataclass(frozen=True)
class Newton:
    """Settings of the iteration.

    Fields:
      sweep: the steps.
      tolerance: of the residual.
      max_iterations: how many at most.
      sweeps: plain steps s_t = f(s_{t-1}, x_t) of all t that follow every update; they correct the update
        where f is far from linear, because the steps of a stable cell forget their initial state.
    """

    sweep: Sweep
    tolerance: float
    max_iterations: int
    sweeps: int

    def find(self, operands: Operands, resets: Array | None) -> Found:
        sweep = self.sweep

        def step(states: Any) -> tuple[Any, Diagonals]:
            return sweep.after(operands, sweep.before(operands, resets, states))

        def look(states: Any) -> Any:
            """What is known of a guess: (f, J, the largest residual up to every step)."""
            after, parts = step(states)
            return after, sweep.jacobian(operands.params, parts, resets), residuals(after, states)

        def proceed(state: Any) -> Array:
            _, _, _, worst, _, count = state
            return (count < self.max_iterations) & jnp.any(worst[-1] > self.tolerance)

        def iterate(state: Any) -> Any:
            states, after, jacobian, worst, iterations, count = state
            update = sweep.solve(jacobian, jax.tree.map(jnp.subtract, after, states))
            whole = jax.tree.map(jnp.add, states, update)
            better = residuals(step(whole)[0], whole)[-1] < worst[-1]
            new = jax.tree.map(lambda a, b: jnp.where(better[..., None], a, within_reach(a, b)), whole, after)
            new, _ = jax.lax.scan(lambda s, _: (step(s)[0], None), new, length=self.sweeps)
            now = look(new)
            # A step is done after the last iteration that found it above the tolerance.
            iterations = jnp.where(now[2] > self.tolerance, count + 1, iterations)
            return new, *now, iterations, count + 1

        guess = sweep.guess(operands)
        first = look(guess)
        state = (guess, *first, jnp.where(first[2] > self.tolerance, 0, -1), jnp.int32(0))
        states, _, _, worst, last_above, count = jax.lax.while_loop(proceed, iterate, state)
        return Found(states, jnp.minimum(last_above + 1, count), worst[-1])

    def check(self, operands: Operands, resets: Array | None, states: Any) -> Found:
        """What is to be said of states that were found at once."""
        worst = residuals(self.sweep.after(operands, self.sweep.before(operands, resets, states))[0], states)
        return Found(states, jnp.ones(worst.shape, jnp.int32), worst[-1])


def within_reach(states: Array, after: Array) -> Array:
    """The states, each unit clipped to the range of the values that the steps have given; NaN is replaced by these."""
    low, high = jnp.min(after, 0), jnp.max(after, 0)
    return jnp.where(jnp.isfinite(states), jnp.clip(states, low, high), after)


def residuals(after: Any, states: Any) -> Array:
    """(T, *batch): the largest residual of the steps up to each; inf where something is no number."""

    def one(a: Array, s: Array) -> Array:
        worst = jnp.max(jnp.abs(a - s) / jnp.maximum(jnp.abs(a), 1), -1)
        return jnp.where(jnp.isfinite(worst), worst, jnp.inf)

    return jax.lax.cummax(functools.reduce(jnp.maximum, map(one, after, states)))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def solution(sweep: Sweep, operands: Operands, resets: Array | None, states: Any) -> Any:
    """The states that solve F = 0, given that `states` do: with their derivatives by the operands, of every order.

    d s = J d s_{-1} + (d f at constant states), which is the linear recurrence that one iteration solves.
    """
    del sweep, operands, resets
    return states


@solution.defjvp
def _solution_jvp(sweep: Sweep, primals: Any, tangents: Any) -> Any:
    operands, resets, states = primals
    # Through the rule again, so that the next order sees that the states depend on the operands.
    states = solution(sweep, operands, resets, states)

    def after(operands: Operands) -> Any:
        return sweep.after(operands, sweep.before(operands, resets, states))[0]

    added = jax.jvp(after, (operands,), (tangents[0],))[1]
    parts = sweep.after(operands, sweep.before(operands, resets, states))[1]
    return states, sweep.solve_exactly(operands.params, parts, resets, added)
