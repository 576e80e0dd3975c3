"""How far back the inputs matter: input influence and the effective memory window."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rnncore._types import Array
from rnncore.analysis.jacobians.products import log_frobenius_norm
from rnncore.analysis.retention._chains import Measure, pull_back
from rnncore.analysis.run.flat import batch_major, flat, one_carry, state_dtype, state_size, time_major, unflatten_carry
from rnncore.analysis.run.trajectory import StepInput, Trajectory, check_finite, check_trajectory


def input_influence(traj: Trajectory, of: str | None = None) -> Array:
    """ln ||d y_T / d x_t||_F for every t: how strongly the last state depends on each input.

    d s_T / d x_t = J_T J_{T-1} ... J_{t+1} (d s_t / d x_t),   y = the field `of` of s

    No Jacobian of the state is formed, and nothing underflows.  With lengths T is the last step of each
    sequence, and the padding has no influence.

    Args:
      traj: a trajectory of T steps.
      of: a field of the carry; by default "c" if there is one, else the whole state.

    Returns:
      (*batch, T), natural logarithms; -inf where nothing is left.

    Raises:
      ValueError: not a field of the carry.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import analysis
      >>> cell = rnncore.LSTM(4)
      >>> run = analysis.trajectory(cell, cell.init(jax.random.key(0), 3), jnp.ones((2, 5, 3)))
      >>> analysis.input_influence(run).shape
      (2, 5)
    """
    check_trajectory("input_influence", traj)
    if of is not None and of not in traj.fields:
        raise ValueError(
            f"`input_influence(of={of!r})`: the carry of {type(traj.cell).__name__} has no {of!r}, only "
            f"{', '.join(traj.fields)}."
        )
    return _influence(traj, of or ("c" if "c" in traj.fields else None))


def effective_window(source: Trajectory | Array | np.ndarray, share: float = 0.9, *, of: str | None = None) -> Array:
    """The number of last steps that hold a given share of the influence of the inputs.

    The smallest k with  sum_{t > T-k} m_t >= share sum_t m_t
    m_t = ||d c_T / d x_t||_F^2 of a trajectory, or ||dL/dx_t||^2 of input gradients

    Args:
      source: a trajectory of T steps, or gradients (*batch, T, D), such as `gradients_over_time(...).inputs`.
      share: above 0, at most 1.
      of: with a trajectory, as in `input_influence`: c where there is one.

    Returns:
      Integers (*batch), 0 to T; 0 if no input has any influence.  For a trajectory with lengths they count from the
      last step of each sequence, for gradients from step T.

    Raises:
      ValueError: a share out of range; gradients of another shape or dtype, or not finite; `of` with gradients.

    Example:
      >>> import jax.numpy as jnp
      >>> from rnncore import analysis
      >>> int(analysis.effective_window(jnp.array([[9.0], [0.0], [1.0], [3.0]]), share=0.1))
      2
    """
    if isinstance(share, bool) or not 0 < share <= 1:
        raise ValueError(f"`effective_window(share={share!r})`: expected more than 0 and at most 1.")
    late: Any = 0
    if isinstance(source, Trajectory):
        logs = input_influence(source, of)
        late = 0 if source.lengths is None else source.steps - source.lengths
    else:
        if of is not None:
            raise ValueError("`effective_window(<gradients>, of=...)`: `of` applies to a trajectory only.")
        if not hasattr(source, "shape"):
            check_trajectory("effective_window", source)
        gradients = jnp.asarray(source)
        what = f"effective_window(<{gradients.dtype} {gradients.shape}>)"
        if gradients.ndim < 2 or not jnp.issubdtype(gradients.dtype, jnp.floating):
            raise ValueError(
                f"`{what}`: expected a trajectory, or floating point (*batch, T, D), such as "
                "`gradients_over_time(...).inputs`."
            )
        check_finite(what, gradients)
        logs = log_frobenius_norm(gradients[..., None, :])
    return jnp.maximum(_window(logs, share) - late, 0)


@jax.jit
def _window(logs: Array, share: float) -> Array:
    top = jnp.max(logs, -1, keepdims=True)
    mass = jnp.exp(2 * (logs - jnp.where(top > -jnp.inf, top, 0)))
    held = jnp.cumsum(jnp.flip(mass, -1), -1)
    total = held[..., -1:]
    # The number of sums that do not suffice gives the first that does; without any mass it is 0.
    missing = jnp.sum(held < share * total, -1)
    return missing + (total[..., 0] > 0).astype(missing.dtype)


def _influence(traj: Trajectory, of: str | None) -> Array:
    count, n = math.prod(traj.batch_shape), state_size(traj)
    rows = jnp.eye(n, dtype=state_dtype(traj))
    if of is not None:
        # Unflattening the unit vectors shows which of them belong to the field.
        inside = getattr(jax.vmap(unflatten_carry(one_carry(traj)))(rows), of).reshape(n, -1)
        rows = rows[jnp.argmax(inside, 0)]
    # The entry for s_t holds the inputs of step t; s_0 has none, and lag T is not needed.
    block = jnp.broadcast_to(rows, (count, *rows.shape))
    return batch_major(traj, jnp.flip(pull_back(traj, block, _at_inputs, _beside(traj), range(traj.steps)), 0))


@jax.jit
def _beside(traj: Trajectory) -> Any:
    now = (*flat(traj).now, time_major(traj, traj.xs))
    return jax.tree.map(lambda a: jnp.concatenate([a[:1], a]), now)


def _at_inputs(traj: Trajectory) -> Measure:
    """The norm of rows (d s_t / d x_t)."""
    step, cell, params = flat(traj).step, traj.cell, traj.params

    def influence(rows: Array, state: Array, now: Any, x: Array) -> Array:
        def new(x: Array) -> Array:
            z = cell.project(params, x)
            return step(state, now._replace(z=z) if isinstance(now, StepInput) else z)

        _, pull = jax.vjp(new, x)
        return log_frobenius_norm(jax.vmap(pull)(rows)[0])

    return lambda rows, before: jax.vmap(influence)(rows, *before)
