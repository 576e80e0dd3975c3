"""Jacobians of single steps along a trajectory, by autodiff or as elementwise coefficients times U."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rnncore._types import Array
from rnncore.analysis.run._shown import shown
from rnncore.analysis.run.flat import batch_major, flat, flatten_carry, time_major
from rnncore.analysis.run.trajectory import Trajectory, check_trajectory, trailing
from rnncore.cells.base import Cell, PointwiseCell
from rnncore.recurrence.step import spread_units

_FIELD = {"hidden": "h", "cell": "c"}
METHODS = ("vjp", "jvp", "analytic")


class StepCoefficients(NamedTuple):
    """The diagonals that make up every step Jacobian of a pointwise cell.

    Fields:
      state: state.a.b is d a_t / d b_{t-1} with r_t held fixed, for fields a, b of the carry; (*batch, T, H).
      recurrent: recurrent.a.g is d a_t / d r_g, for a field a of the carry and a gate g; (*batch, T, H).
    """

    state: Any
    recurrent: Any

    def __repr__(self) -> str:
        return shown(self)


def step_coefficients(traj: Trajectory) -> StepCoefficients:
    """Elementwise derivatives of one step of a pointwise cell, for every step.

    d s_t / d s_{t-1} = diag(state) + sum_g diag(recurrent_g) U_g

    For an LSTM without peepholes state.c.c is f_t and recurrent.h.o is tanh(c_t) o_t (1 - o_t).  At a reset all
    are 0; in the padding d a_t / d a_{t-1} is 1 and all others are 0.

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
    check_trajectory("step_coefficients", traj)
    _pointwise_cell(traj.cell, "step_coefficients(...)")
    return _coefficients(traj)


def step_jacobians(traj: Trajectory, *, wrt: str = "state", method: str = "vjp", chunk: int | None = None) -> Array:
    """The Jacobian of every step; row = output, column = input.

    J_t = d s_t / d s_{t-1},   s = the fields of the carry side by side, [c; h] for an LSTM

    Exactly 0 at a reset; the identity in the padding, where the carry stays the same.

    Args:
      traj: a trajectory of T steps.
      wrt: "state", all of s (n entries); "hidden", d h_t / d h_{t-1} with the other fields held fixed;
        "cell", d c_t / d c_{t-1} with h_{t-1} held fixed.
      method: "vjp", `jax.vjp` of one step for every unit cotangent, any cell; "jvp", `jax.linearize` for
        every unit tangent, any cell; "analytic", the `step_coefficients` times U, pointwise cells only.
      chunk: how many steps to compute at once; None for all T, which takes the most memory.

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
    check_trajectory("step_jacobians", traj)
    if method not in METHODS:
        raise ValueError(f"`step_jacobians(method={method!r})`: expected one of {', '.join(map(repr, METHODS))}.")
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
        return _analytic(traj, field, chunk)
    return _by_autodiff(traj, field, method, chunk)


def _pointwise_cell(cell: Cell, call: str) -> None:
    if not isinstance(cell, PointwiseCell):
        raise NotImplementedError(
            f"`{call}`: {type(cell).__name__} is not a PointwiseCell, so its step has no elementwise coefficients; "
            "use `step_jacobians(method='vjp')`."
        )


@functools.partial(jax.jit, static_argnames=("field", "method", "chunk"))
def _by_autodiff(traj: Trajectory, field: str | None, method: str, chunk: int | None) -> Array:
    """Every step on its own, given the stored carries."""
    run, before = flat(traj), time_major(traj, traj.before)
    sizes = {name: flatten_carry(a, 2).shape[-1] for name, a in zip(traj.fields, before, strict=True)}
    start = sum(sizes[name] for name in traj.fields[: traj.fields.index(field)]) if field else 0
    size = sizes[field] if field else sum(sizes.values())

    def jacobian(state: Array, now: Any) -> Array:
        def moving(part: Array) -> Array:
            whole = state.at[start : start + size].set(part)
            return run.step(whole, now)[start : start + size]

        eye = jnp.eye(size, dtype=state.dtype)
        if method == "jvp":
            _, push = jax.linearize(moving, state[start : start + size])
            return jax.vmap(push)(eye).T
        _, pull = jax.vjp(moving, state[start : start + size])
        (rows,) = jax.vmap(pull)(eye)
        return rows

    with jax.default_matmul_precision("highest"):
        return batch_major(traj, _over_steps(lambda now: jax.vmap(jacobian)(*now), run.now, chunk))


@functools.partial(jax.jit, static_argnames=("field", "chunk"))
def _analytic(traj: Trajectory, field: str | None, chunk: int | None) -> Array:
    """diag(state) + sum_g diag(recurrent_g) U_g."""
    cell = traj.cell
    assert isinstance(cell, PointwiseCell)
    matrices = cell.recurrence.gate_matrices(traj.params.recurrent_kernel)
    names = (field,) if field else traj.fields
    make = functools.partial(_assemble, matrices, names)
    if chunk is None:
        return make(_coefficients(traj))
    return batch_major(traj, _over_steps(make, time_major(traj, _coefficients(traj)), chunk))


def _over_steps(make: Any, now: Any, chunk: int | None) -> Array:
    """`make` over arrays (T, B, ...), all steps at once or `chunk` of them."""
    return jax.vmap(make)(now) if chunk is None else jax.lax.map(make, now, batch_size=chunk)


def _assemble(matrices: Array, names: tuple[str, ...], coefficients: StepCoefficients) -> Array:
    """The Jacobian from coefficients (..., H), as one elementwise expression over (..., to, i, source, j).

    U_g is padded with zeros for all sources but h, so that the result is written once, without temporaries.
    """
    size = matrices.shape[-1]
    none = jnp.zeros_like(matrices)
    wide = jnp.stack([matrices if source == "h" else none for source in names], -2)  # (G, i, source, j)
    direct = jnp.stack(
        [jnp.stack([getattr(getattr(coefficients.state, to), source) for source in names], -2) for to in names], -3
    )  # (..., to, source, i)
    jacobian = jnp.swapaxes(direct, -1, -2)[..., None] * jnp.eye(size, dtype=matrices.dtype)[:, None]
    for g, matrix in enumerate(wide):
        gate = jnp.stack([getattr(coefficients.recurrent, to)[g] for to in names], -2)  # (..., to, i)
        jacobian = jacobian + gate[..., None, None] * matrix
    return jacobian.reshape(*jacobian.shape[:-4], len(names) * size, len(names) * size)


@jax.jit
def _coefficients(traj: Trajectory) -> StepCoefficients:
    """One tangent of ones for each elementwise input, which reads off the diagonal."""
    cell, params = traj.cell, traj.params
    assert isinstance(cell, PointwiseCell)
    before = traj.before
    with jax.default_matmul_precision("highest"):
        r = cell.split(cell.recurrent_matmul(params, before.h))
    z = cell.split(traj.zs)
    units = spread_units(params, before.h)
    _, push = jax.linearize(lambda r, carry: cell.pointwise(units, z, r, carry)[0], r, before)
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

    coefficients = StepCoefficients(state=by_input(1), recurrent=by_input(0))
    return _cut(traj, coefficients)


def _cut(traj: Trajectory, coefficients: StepCoefficients) -> StepCoefficients:
    """0 at resets, the identity in the padding."""
    for mask, stays in ((traj.resets, 0.0), (traj.padding, 1.0)):
        if mask is None:
            continue

        def kept(a: Array, value: float = 0.0, mask: Array = mask) -> Array:
            return jnp.where(trailing(mask, a), value, a)

        state, recurrent = jax.tree.map(kept, coefficients)
        own = {
            name: getattr(state, name)._replace(**{name: kept(getattr(getattr(state, name), name), stays)})
            for name in state._fields
        }
        coefficients = StepCoefficients(state._replace(**own), recurrent)
    return coefficients
