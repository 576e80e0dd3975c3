"""A run of a cell with all that its linearisation needs: inputs, every carry, every gate."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rnncore._types import Array, PyTree
from rnncore.cells.base import Cell
from rnncore.sequence import unroll


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("params", "xs", "zs", "carries", "gates"), meta_fields=("cell",)
)
@dataclasses.dataclass(frozen=True)
class Trajectory:
    """A stored run, batch-major; a pytree in which the cell is static.

    Fields:
      cell: the cell that ran.
      params: its parameters.
      xs: inputs (*batch, T, D).
      zs: projected inputs (*batch, T, ...).
      carries: T + 1 carries, arrays (*batch, T + 1, ...), the initial one first.
      gates: what the cell calls its gates, arrays (*batch, T, ...).
    """

    cell: Cell
    params: PyTree
    xs: Array
    zs: PyTree
    carries: Any
    gates: PyTree

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The batch axes; () for one sequence."""
        return self.xs.shape[:-2]

    @property
    def steps(self) -> int:
        """T."""
        return self.xs.shape[-2]

    @property
    def last(self) -> Any:
        """The carry after the last step: where the loss of an adjoint curve is differentiated."""
        return jax.tree.map(
            lambda a: jax.lax.index_in_dim(a, self.steps, len(self.batch_shape), keepdims=False), self.carries
        )

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields of the carry, in the order in which the state concatenates them."""
        return self.carries._fields


def trajectory(cell: Cell, params: PyTree, xs: Array, initial_carry: Any = None) -> Trajectory:
    """Runs a cell and keeps every carry and gate.

    s_t, gates_t = update(params, s_{t-1}, z_t),   z_t = project(params, x_t),   t = 1 .. T

    Args:
      cell: any rnncore cell.
      params: its parameters.
      xs: inputs (*batch, T, D); any number of batch axes, none too.
      initial_carry: carry of (*batch, H) arrays; zeros by default.

    Returns:
      `Trajectory`.

    Raises:
      ValueError: inputs that are not floating point or have no step; parameters, inputs or states
        that are not finite.  Inside jit the values cannot be seen and are not checked.
      NotImplementedError: half precision, whose products over many steps mean nothing.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import analysis
      >>> cell = rnncore.LSTM(4)
      >>> run = analysis.trajectory(cell, cell.init(jax.random.key(0), 3), jnp.ones((2, 5, 3)))
      >>> run.carries.c.shape, run.gates.f.shape
      ((2, 6, 4), (2, 5, 4))
    """
    xs = jnp.asarray(xs)
    if not jnp.issubdtype(xs.dtype, jnp.floating):
        raise ValueError(
            f"`trajectory(xs=<{xs.dtype} {xs.shape}>)`: expected floating point (*batch, T, D); "
            "embed or convert the inputs first."
        )
    for leaf in jax.tree.leaves((params, xs, initial_carry)):
        if jnp.issubdtype(leaf.dtype, jnp.floating) and jnp.finfo(leaf.dtype).bits < 32:
            raise NotImplementedError(
                f"`trajectory` with {leaf.dtype}: products over many steps lose all digits in half precision; "
                "convert params, xs and initial_carry to float32 or float64."
            )
    if xs.ndim >= 2 and xs.shape[-2] == 0:
        raise ValueError(f"`trajectory(xs=<{xs.dtype} {xs.shape}>)`: no steps; expected T of at least 1.")
    for name, tree in (("params", params), ("xs", xs), ("initial_carry", initial_carry)):
        check_finite(f"trajectory({name}=...)", tree, "find out where they come from before measuring gradients")
    _, _, states = unroll(
        cell, params, xs, initial_carry=initial_carry, return_states=True, include_initial=True, differentiation="any"
    )
    check_finite("trajectory(...)", states.carries, "the states leave the floating-point range; shorten or rescale")
    return Trajectory(cell, params, xs, cell.project(params, xs), states.carries, states.gates)


def check_finite(call: str, tree: PyTree, advice: str) -> None:
    """Refuses NaN and inf in arrays whose values can be seen."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, jax.core.Tracer):
            continue
        bad = int(np.sum(~np.isfinite(np.asarray(leaf))))
        if bad:
            raise ValueError(
                f"`{call}`: {jax.tree_util.keystr(path) or 'the array'} of shape {leaf.shape} holds {bad} NaN or "
                f"infinite numbers; {advice}."
            )


def flatten_carry(carry: Any, lead: int) -> Array:
    """A carry with `lead` leading axes as one state vector: arrays (*lead, ...) to (*lead, n)."""
    leaves = jax.tree.leaves(carry)
    dtype = jnp.result_type(*leaves)
    return jnp.concatenate([a.reshape(*a.shape[:lead], -1).astype(dtype) for a in leaves], -1)


def unflatten_carry(like: Any) -> Callable[[Array], Any]:
    """The inverse of `flatten_carry` for one example: (n,) to a carry of the shapes and dtypes of `like`."""
    leaves, tree = jax.tree.flatten(like)
    shapes, dtypes = [a.shape for a in leaves], [a.dtype for a in leaves]
    sizes = [int(np.prod(shape)) for shape in shapes]

    def unflatten(state: Array) -> Any:
        pieces = jax.lax.split(state, sizes, 0)
        leaves = [a.reshape(shape).astype(dtype) for a, shape, dtype in zip(pieces, shapes, dtypes, strict=True)]
        return jax.tree.unflatten(tree, leaves)

    return unflatten


def flat_step(traj: Trajectory) -> Callable[[Array, PyTree], Array]:
    """One step of one example on state vectors: (s_{t-1} (n,), z_t) to s_t (n,)."""
    lead = len(traj.batch_shape) + 1
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[lead:], a.dtype), traj.carries)
    unflatten = unflatten_carry(one)

    def step(state: Array, z: PyTree) -> Array:
        carry, _ = traj.cell.update(traj.params, unflatten(state), z)
        return flatten_carry(carry, 0)

    return step


def time_major(traj: Trajectory, tree: PyTree) -> PyTree:
    """Arrays (*batch, T, ...) as (T, B, ...) with the batch axes merged."""
    lead = len(traj.batch_shape)
    count = int(np.prod(traj.batch_shape))

    def move(a: Array) -> Array:
        return jnp.moveaxis(a.reshape(count, *a.shape[lead:]), 1, 0)

    return jax.tree.map(move, tree)


def time_major_states(traj: Trajectory) -> Array:
    """All T + 1 state vectors as (T + 1, B, n)."""
    return flatten_carry(time_major(traj, traj.carries), 2)


def batch_major(traj: Trajectory, a: Array) -> Array:
    """An array (T, B, ...) as (*batch, T, ...)."""
    a = jnp.moveaxis(a, 0, 1)
    return a.reshape(*traj.batch_shape, *a.shape[1:])
