"""A run as one state vector per step, time first, and the step as a function of that vector.

Whatever follows Jacobians along a run starts from `flat(traj)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rnncore._types import Array, PyTree
from rnncore.analysis.run.trajectory import StepInput, Trajectory, refuse_ragged

Step = Callable[[Array, Any], Array]
"""(state (n,), other inputs of the step) to the next state (n,)."""
Through = Callable[..., Array]
"""(state (n,), other inputs of the step, block (m, n)) to the block on the other side of the step."""


class Flat(NamedTuple):
    """A trajectory with the batch axes merged to B and every carry as one vector of n entries.

    Fields:
      step: (s_{t-1} (n,), entry t of `inputs`) to s_t (n,), for one example.
      before: (T, B, n), the state that enters each step: s_{t-1}, or the reset state.
      inputs: arrays (T, B, ...), the other inputs of the steps.
    """

    step: Step
    before: Array
    inputs: PyTree

    @property
    def now(self) -> tuple[Array, PyTree]:
        """(before, inputs): what a scan over the steps takes."""
        return self.before, self.inputs


def flat(traj: Trajectory) -> Flat:
    """The flat form of a run."""
    before = flatten_carry(time_major(traj, traj.before), 2)
    return Flat(flat_step(traj), before, time_major(traj, traj.inputs))


def state_size(traj: Trajectory) -> int:
    """n, the number of entries of the state of one sequence."""
    return sum(math.prod(a.shape[len(traj.batch_shape) + 1 :]) for a in jax.tree.leaves(traj.carries))


def state_dtype(traj: Trajectory) -> Any:
    """The dtype of the state vector."""
    return jnp.result_type(*jax.tree.leaves(traj.carries))


# --------------------------------------------------------------------------------- one step, differentiated


def rows_through(step: Step) -> Through:
    """Rows times the Jacobian of one step, which is never formed: back in time."""

    def through(state: Array, now: Any, rows: Array) -> Array:
        _, pull = jax.vjp(lambda s: step(s, now), state)
        return jax.vmap(pull)(rows)[0]

    return through


def columns_through(step: Step) -> Through:
    """The Jacobian of one step times columns, stored as rows: forward in time."""

    def through(state: Array, now: Any, columns: Array) -> Array:
        _, push = jax.linearize(lambda s: step(s, now), state)
        return jax.vmap(push)(columns)

    return through


def jacobian(step: Step) -> Step:
    """(state, other inputs of the step) to J (n, n), row = output."""

    def of(state: Array, now: Any) -> Array:
        return rows_through(step)(state, now, jnp.eye(state.shape[0], dtype=state.dtype))

    return of


# ----------------------------------------------------------------------------------------- carries as vectors


def flatten_carry(carry: Any, lead: int) -> Array:
    """A carry with `lead` leading axes as one state vector: arrays (*lead, ...) to (*lead, n)."""
    leaves = jax.tree.leaves(carry)
    dtype = jnp.result_type(*leaves)
    return jnp.concatenate([a.reshape(*a.shape[:lead], -1).astype(dtype) for a in leaves], -1)


def unflatten_carry(like: Any) -> Callable[[Array], Any]:
    """The inverse of `flatten_carry` for one example: (n,) to a carry of the shapes and dtypes of `like`."""
    leaves, tree = jax.tree.flatten(like)

    def unflatten(state: Array) -> Any:
        pieces = jax.lax.split(state, [math.prod(a.shape) for a in leaves], 0)
        whole = [piece.reshape(a.shape).astype(a.dtype) for piece, a in zip(pieces, leaves, strict=True)]
        return jax.tree.unflatten(tree, whole)

    return unflatten


def states_of(first: Any, rest: Array, lead: int) -> Any:
    """A first carry (*batch, ...) and later states (*batch, T, n) as one carry of arrays (*batch, T + 1, ...)."""
    leaves, tree = jax.tree.flatten(first)
    shapes = [a.shape[lead:] for a in leaves]
    pieces = jax.lax.split(rest, list(map(math.prod, shapes)), lead + 1)
    states = [
        jnp.concatenate([jnp.expand_dims(a, lead), piece.reshape(*piece.shape[:-1], *shape)], lead)
        for a, piece, shape in zip(leaves, pieces, shapes, strict=True)
    ]
    return jax.tree.unflatten(tree, states)


def one_carry(traj: Trajectory) -> Any:
    """Shapes and dtypes of the carry of one example."""
    lead = len(traj.batch_shape) + 1
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[lead:], a.dtype), traj.carries)


def flat_step(traj: Trajectory) -> Step:
    """One step of one example on state vectors: (s_{t-1} (n,), entry t of `traj.inputs`) to s_t (n,).

    A reset step computes s_t from the state that it is given, with derivative 0: give it that of `traj.before`
    where the value matters.
    """
    unflatten = unflatten_carry(one_carry(traj))

    def step(state: Array, now: PyTree) -> Array:
        if not isinstance(now, StepInput):
            refuse_ragged(traj, "flat_step")
        z, reset, padding = now if isinstance(now, StepInput) else (now, None, None)
        kept = state if reset is None else jnp.where(reset, jax.lax.stop_gradient(state), state)
        carry, _ = traj.cell.update(traj.params, unflatten(kept), z)
        new = flatten_carry(carry, 0).astype(state.dtype)
        return new if padding is None else jnp.where(padding, state, new)

    return step


# -------------------------------------------------------------------------------------------- time and batch


def time_major(traj: Trajectory, tree: PyTree) -> PyTree:
    """Arrays (*batch, T, ...) as (T, B, ...) with the batch axes merged."""
    lead, count = len(traj.batch_shape), math.prod(traj.batch_shape)
    return jax.tree.map(lambda a: jnp.moveaxis(a.reshape(count, *a.shape[lead:]), 1, 0), tree)


def batch_major(traj: Trajectory, a: Array) -> Array:
    """An array (T, B, ...) as (*batch, T, ...)."""
    a = jnp.moveaxis(a, 0, 1)
    return a.reshape(*traj.batch_shape, *a.shape[1:])
