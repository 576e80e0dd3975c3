"""Eigenvalues of the Jacobian of one step, and all singular values of a product of many."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rnncore._types import Array
from rnncore.analysis.dynamics._frames import first_frame, graded_qr, matrix_of
from rnncore.analysis.dynamics._jacobi import NOTHING, log_singular_values
from rnncore.analysis.jacobians.products import renormalise
from rnncore.analysis.run._alignment import check_lag, ending_together
from rnncore.analysis.run.flat import flat, jacobian, state_dtype, state_size
from rnncore.analysis.run.trajectory import Trajectory, check_finite, check_trajectory


def jacobian_eigenvalues(traj: Trajectory, t: int) -> Array:
    """The eigenvalues of the Jacobian of one step, in order of falling modulus.

    eig(J_t),   J_t = d s_t / d s_{t-1},   t = 1 .. T

    Args:
      traj: a trajectory of T steps.
      t: the step, 1 for the first.

    Returns:
      (*batch, n) complex, computed in NumPy, so not inside jit.

    Raises:
      ValueError: no such step.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import analysis
      >>> cell = rnncore.Elman(4)  # its initial U is orthogonal
      >>> run = analysis.trajectory(cell, cell.init(jax.random.key(0), 3), jnp.zeros((1, 3)))
      >>> abs(analysis.jacobian_eigenvalues(run, 1)).round(4).tolist()
      [1.0, 1.0, 1.0, 1.0]
    """
    check_trajectory("jacobian_eigenvalues", traj)
    if not isinstance(t, int | np.integer) or not 1 <= t <= traj.steps:
        raise ValueError(f"`jacobian_eigenvalues(t={t})`: expected a step from 1 to T = {traj.steps}.")
    jacobian = np.asarray(_one_jacobian(traj, int(t)))
    check_finite(f"jacobian_eigenvalues(t={t})", jacobian, "use float64")
    values = np.linalg.eigvals(jacobian).astype(np.result_type(jacobian.dtype, np.complex64))
    values = np.take_along_axis(values, np.argsort(-np.abs(values), -1, kind="stable"), -1)
    return jnp.asarray(values.reshape(*traj.batch_shape, -1))


def singular_spectrum(traj: Trajectory, lag: int, anchor: str = "end") -> Array:
    """ln of all singular values of the product of `lag` step Jacobians, however far apart they are.

    Divided by the lag they are growth rates, which tend to the Lyapunov exponents as the lag goes to infinity.

    anchor "end":   P = J_T J_{T-1} ... J_{T-lag+1}
    anchor "start": P = J_lag J_{lag-1} ... J_1

    The product itself is never formed: in float64 all values below 1e-16 of the largest would be lost.
    A backward pass aligns a frame with the right singular vectors, a forward pass collects the triangular
    factors row by row with separate scales, and rotations of the rows do the rest.  The error of every logarithm
    is about eps times the sum of the condition numbers of the single steps, whatever that of the product, so
    float64 resolves steps with condition numbers up to 1e15, float32 up to 1e6.

    Args:
      traj: a trajectory of T steps.
      lag: the number of factors, 0 to T; with lengths at most the shortest one, and anchor "end" is the end of each
        sequence.
      anchor: which end is fixed.

    Returns:
      (*batch, n), largest first.  -inf for directions that are lost, exactly (all of them across a reset) or to
      rounding; never NaN.

    Raises:
      ValueError: a lag above the length of the trajectory, unknown anchor; a Jacobian that overflows.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import analysis
      >>> cell = rnncore.Elman(2, activation_fn=jax.nn.identity)
      >>> kernel = jnp.diag(jnp.array([0.5, 0.01]))[:, None]
      >>> params = cell.init(jax.random.key(0), 1)._replace(recurrent_kernel=kernel)
      >>> run = analysis.trajectory(cell, params, jnp.zeros((1000, 1)))
      >>> (analysis.singular_spectrum(run, 1000) / jnp.log(10.0)).round(1).tolist()
      [-301.0, -2000.0]

    Source: Bojanczyk, Ewerbring, Luk and Van Dooren (1991) for products kept as factors; Hestenes (1958)
    for one-sided rotations, Demmel and Veselic (1992) for their accuracy.
    """
    lag = check_lag("singular_spectrum", traj, lag, anchor)
    run = ending_together(traj) if anchor == "end" else traj
    n, dtype = state_size(traj), state_dtype(traj)
    if lag == 0:
        return jnp.zeros((*traj.batch_shape, n), dtype)
    frame = first_frame(jax.random.key(0), n, n, dtype)
    logs = _log_spectrum(run, frame, traj.steps - lag if anchor == "end" else 0, lag)
    if not isinstance(logs, jax.core.Tracer) and not np.all(np.asarray(logs) < np.inf):
        raise ValueError(
            f"`singular_spectrum(lag={lag})`: the Jacobian of a single step leaves the range of {logs.dtype}; use "
            "float64."
        )
    return logs


@functools.partial(jax.jit, static_argnums=1)
def _one_jacobian(traj: Trajectory, t: int) -> Array:
    """J_t, (B, n, n)."""
    run = flat(traj)
    with jax.default_matmul_precision("highest"):
        return jax.vmap(jacobian(run.step))(*jax.tree.map(lambda a: a[t - 1], run.now))


@functools.partial(jax.jit, static_argnums=3)
def _log_spectrum(run: Trajectory, frame: Array, first: int, lag: int) -> Array:
    """(*batch, n) for a checked call: of the steps from `first` on."""
    step, _, _ = whole = flat(run)
    now = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, first, lag), whole.now)
    _, count, n = now[0].shape
    dtype = now[0].dtype
    back, forth = jax.vmap(matrix_of(step, "backward")), jax.vmap(matrix_of(step, "forward"))

    def turn(frame: Array, now: Any) -> tuple[Array, None]:
        # Scaled before the QR, whose orthonormal rows are all that is kept.
        block, _ = renormalise(frame @ back(*now), jnp.zeros((count,), jnp.int32))
        return graded_qr(block, 0.0)[0], None

    def collect(carry: Any, now: Any) -> Any:
        frame, lost, rows, exponents = carry
        block, power = renormalise(frame @ forth(*now), jnp.zeros((count,), jnp.int32))
        frame, r, here = graded_qr(block, 1.0)
        lost = lost | here
        rows, exponents = _times(jnp.where(lost[..., None], 0.0, r), rows, exponents)
        exponents = jnp.where(exponents > NOTHING, exponents + power[:, None], NOTHING)
        return (frame, lost, rows, exponents), None

    eye = jnp.broadcast_to(jnp.eye(n, dtype=dtype), (count, n, n))
    frame = jnp.broadcast_to(frame, eye.shape)
    with jax.default_matmul_precision("highest"):
        frame, _ = jax.lax.scan(turn, frame, now, reverse=True)
        start = (frame, jnp.zeros((count, n), bool), eye, jnp.zeros((count, n), jnp.int32))
        (_, _, rows, exponents), _ = jax.lax.scan(collect, start, now)
        logs = jax.vmap(log_singular_values)(rows, exponents)
    bad = ~jnp.all(jnp.isfinite(rows), (-2, -1))
    return jnp.where(bad[:, None], jnp.nan, logs).reshape(*run.batch_shape, n)


def _times(r: Array, rows: Array, exponents: Array) -> tuple[Array, Array]:
    """R diag(2^exponents) rows as rows with exponents of their own; R (B, n, n)."""
    mantissa, power = jnp.frexp(r)
    power = jnp.where(mantissa == 0, NOTHING, jnp.maximum(power + exponents[:, None, :], NOTHING))
    top = jnp.max(power, -1)
    # At most 1 in each row; what underflows is nothing beside that.
    weights = jnp.ldexp(mantissa, jnp.maximum(power - top[..., None], -10_000))
    rows, top = renormalise((weights @ rows)[..., None, :], top)
    rows = rows[..., 0, :]
    return rows, jnp.where(jnp.any(rows != 0, -1), jnp.maximum(top, NOTHING), NOTHING)
