"""Jacobians of single steps along a trajectory: by autodiff, and as elementwise coefficients times U."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rnncore._types import Array
from rnncore.analysis.trajectory import Trajectory, batch_major, flat_step, flatten_carry, time_major
from rnncore.cells.base import Cell, PointwiseCell

_FIELD = {"hidden": "h", "cell": "c"}


class StepCoefficients(NamedTuple):
    """The diagonals from which every step Jacobian of a pointwise cell is made.

    Fields:
      state: state.a.b is d a_t / d b_{t-1} with r_t held fixed, for fields a, b of the carry; (*batch, T, H).
      recurrent: recurrent.a.g is d a_t / d r_g, for a field a of the carry and a gate g; (*batch, T, H).
    """

    state: Any
    recurrent: Any


def step_coefficients(traj: Trajectory) -> StepCoefficients:
    """Elementwise derivatives of one step of a pointwise cell, for every step.

    d s_t / d s_{t-1} = diag(state) + sum_g diag(recurrent_g) U_g

    For an LSTM without peepholes state.c.c is f_t and recurrent.h.o is tanh(c_t) o_t (1 - o_t).

    Args:
      traj: a trajectory of T steps.

    Returns:
      `StepCoefficients` of arrays (*batch, T, H).

    Raises:
      NotImplementedError: the cell is not a `PointwiseCell`.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import analysis
      >>> cell = rnncore.LSTM(4)
      >>> run = analysis.trajectory(cell, cell.init(jax.random.key(0), 3), jnp.ones((5, 3)))
      >>> bool(jnp.allclose(analysis.step_coefficients(run).state.c.c, run.gates.f))
      True
    """
    _pointwise_cell(traj.cell, "step_coefficients(...)")
    return _coefficients(traj)


def step_jacobians(traj: Trajectory, *, wrt: str = "state", method: str = "vjp", chunk: int | None = None) -> Array:
    """The Jacobian of every step; row = output, column = input.

    J_t = d s_t / d s_{t-1},   s = the fields of the carry side by side, [c; h] for an LSTM

    Args:
      traj: a trajectory of T steps.
      wrt: "state", all of s (n entries); "hidden", d h_t / d h_{t-1} with the other fields held fixed;
        "cell", d c_t / d c_{t-1} with h_{t-1} held fixed.
      method: "vjp", `jax.vjp` of one step for every unit cotangent, any cell; "analytic", the
        `step_coefficients` times U, pointwise cells only.
      chunk: with "vjp", how many steps run at once; None for all T, which takes the most memory.

    Returns:
      Array (*batch, T, n, n); [..., t, :, :] is the Jacobian of step t + 1.

    Raises:
      ValueError: unknown wrt or method; the carry has no such field.
      NotImplementedError: "analytic" for a cell that is not pointwise.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import analysis
      >>> cell = rnncore.LSTM(4)
      >>> run = analysis.trajectory(cell, cell.init(jax.random.key(0), 3), jnp.ones((2, 5, 3)))
      >>> analysis.step_jacobians(run).shape, analysis.step_jacobians(run, wrt="hidden").shape
      ((2, 5, 8, 8), (2, 5, 4, 4))
    """
    if method not in ("vjp", "analytic"):
        raise ValueError(f"`step_jacobians(method={method!r})`: expected 'vjp' or 'analytic'.")
    if wrt != "state" and wrt not in _FIELD:
        raise ValueError(f"`step_jacobians(wrt={wrt!r})`: expected 'state', 'hidden' or 'cell'.")
    field = _FIELD.get(wrt)
    if field is not None and field not in traj.fields:
        raise ValueError(
            f"`step_jacobians(wrt={wrt!r})`: the carry of {type(traj.cell).__name__} has no {field!r}, only "
            f"{', '.join(traj.fields)}; use wrt='state'."
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"`step_jacobians(chunk={chunk})`: expected at least 1 step, or None for all.")
    if method == "analytic":
        _pointwise_cell(traj.cell, "step_jacobians(method='analytic')")
        return _analytic(traj, field)
    return _by_vjp(traj, field, chunk)


def _pointwise_cell(cell: Cell, call: str) -> None:
    if not isinstance(cell, PointwiseCell):
        raise NotImplementedError(
            f"`{call}`: {type(cell).__name__} is not a PointwiseCell, so its step has no elementwise coefficients; "
            "use `step_jacobians(method='vjp')`."
        )


@functools.partial(jax.jit, static_argnames=("field", "chunk"))
def _by_vjp(traj: Trajectory, field: str | None, chunk: int | None) -> Array:
    """Every step on its own, given the stored carries."""
    step = flat_step(traj)
    before = time_major(traj, _before(traj))
    sizes = {name: flatten_carry(a, 2).shape[-1] for name, a in zip(traj.fields, before, strict=True)}
    start = sum(sizes[name] for name in traj.fields[: traj.fields.index(field)]) if field else 0
    size = sizes[field] if field else sum(sizes.values())

    def jacobian(state: Array, z: Any) -> Array:
        def moving(part: Array) -> Array:
            whole = state.at[start : start + size].set(part)
            return step(whole, z)[start : start + size]

        _, pull = jax.vjp(moving, state[start : start + size])
        (rows,) = jax.vmap(pull)(jnp.eye(size, dtype=state.dtype))
        return rows

    states, zs = flatten_carry(before, 2), time_major(traj, traj.zs)
    with jax.default_matmul_precision("highest"):
        over_batch = jax.vmap(jacobian)
        if chunk is None:
            return batch_major(traj, jax.vmap(over_batch)(states, zs))
        return batch_major(traj, jax.lax.map(lambda now: over_batch(*now), (states, zs), batch_size=chunk))


@functools.partial(jax.jit, static_argnames=("field",))
def _analytic(traj: Trajectory, field: str | None) -> Array:
    """diag(state) + sum_g diag(recurrent_g) U_g, block by block."""
    cell = traj.cell
    assert isinstance(cell, PointwiseCell)
    matrices = cell.recurrence.gate_matrices(traj.params.recurrent_kernel)
    eye = jnp.eye(cell.hidden_size, dtype=matrices.dtype)
    coefficients = _coefficients(traj)
    names = (field,) if field else traj.fields

    def block(to: str, source: str) -> Array:
        direct = getattr(getattr(coefficients.state, to), source)[..., None] * eye
        if source != "h":
            return direct
        gates = jnp.stack(getattr(coefficients.recurrent, to), -1)  # (*batch, T, H, G)
        return direct + jnp.einsum("...ig,gij->...ij", gates, matrices, precision="highest")

    rows = [jnp.concatenate([block(to, source) for source in names], -1) for to in names]
    return jnp.concatenate(rows, -2)


@jax.jit
def _coefficients(traj: Trajectory) -> StepCoefficients:
    """One tangent of ones for each elementwise input: for such a function that reads off the diagonal."""
    cell, params = traj.cell, traj.params
    assert isinstance(cell, PointwiseCell)
    before = _before(traj)
    with jax.default_matmul_precision("highest"):
        r = cell.split(cell.mix(params, before.h))
    z = cell.split(traj.zs)
    p = jax.tree.map(lambda u: jnp.broadcast_to(u, before.h.shape), params.units)
    _, push = jax.linearize(lambda r, carry: cell.pointwise(p, z, r, carry)[0], r, before)
    zeros = jax.tree.map(jnp.zeros_like, (r, before))

    def by_input(which: int) -> Any:
        """(field to input to diagonal) for the gates (0) or the fields of the carry (1)."""
        columns = []
        for name in zeros[which]._fields:
            tangents = list(zeros)
            ones = jnp.ones_like(getattr(zeros[which], name))
            tangents[which] = zeros[which]._replace(**{name: ones})
            columns.append(push(*tangents))
        return type(before)(*(type(zeros[which])(*row) for row in zip(*columns, strict=True)))

    return StepCoefficients(state=by_input(1), recurrent=by_input(0))


def _before(traj: Trajectory) -> Any:
    """The carry before every step: (*batch, T, ...)."""
    axis = len(traj.batch_shape)
    return jax.tree.map(lambda a: jax.lax.slice_in_dim(a, 0, traj.steps, axis=axis), traj.carries)
