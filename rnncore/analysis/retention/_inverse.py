"""The smallest singular value of a product of Jacobians, as the largest one of its inverse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rnncore._types import Array
from rnncore.analysis.jacobians.products import log_operator_norm, nats, renormalise
from rnncore.analysis.run.flat import flat, jacobian
from rnncore.analysis.run.trajectory import Trajectory


def log_smallest(traj: Trajectory, anchor: str, lags: Sequence[int]) -> Array:
    """ln of the smallest singular value of P_k at the lags, (len(lags), B).

    sigma_min(P_k) = 1 / ||P_k^-1||_2.  The product keeps its largest singular values to rounding and loses the
    smallest after a few steps; its inverse, built by solving with one Jacobian after another, keeps exactly
    these.  -inf from the first step on whose Jacobian is singular to working precision.
    """
    run = flat(traj)
    _, count, n = run.before.shape
    dtype, linear = run.before.dtype, jax.vmap(jacobian(run.step))
    top = lags[-1]
    chosen = slice(traj.steps - top, traj.steps) if anchor == "end" else slice(0, top)
    now = jax.tree.map(lambda a: jnp.flip(a[chosen], 0) if anchor == "end" else a[chosen], run.now)
    wanted = np.isin(np.arange(1, top + 1), lags)

    def one(carry: Any, now: Any) -> Any:
        inverse, exponent, singular = carry
        (state, inputs), want = now
        ahead = linear(state, inputs)
        # P_{k+1}^-1 is J^-1 P_k^-1 from the end; from the start P_k^-1 J^-1, of which the transpose is kept.
        matrix = ahead if anchor == "end" else jnp.swapaxes(ahead, -1, -2)
        inverse, lost = _solve(matrix, inverse)
        inverse, exponent = renormalise(inverse, exponent)
        singular = singular | lost
        nothing = jnp.zeros(count, inverse.dtype)
        size = jax.lax.cond(want, lambda: log_operator_norm(inverse) + nats(exponent, inverse.dtype), lambda: nothing)
        return (inverse, exponent, singular), jnp.where(singular, -jnp.inf, -size)

    with jax.default_matmul_precision("highest"):
        eye = jnp.broadcast_to(jnp.eye(n, dtype=dtype), (count, n, n))
        start = (*renormalise(eye, jnp.zeros(count, jnp.int32)), jnp.zeros(count, bool))
        _, logs = jax.lax.scan(one, start, (now, jnp.asarray(wanted)))
    return jnp.concatenate([jnp.zeros((1, count), dtype), logs])[np.asarray(lags)]


def _solve(matrix: Array, right: Array) -> tuple[Array, Array]:
    """(X of matrix X = right, whether the matrix is singular); X is something finite where it is."""
    n, dtype = matrix.shape[-1], matrix.dtype
    # Equilibrated first: a unit that forgets much faster than the others is no singularity.
    rows = _inverse_size(matrix, -1)
    columns = _inverse_size(matrix * rows, -2)
    even = matrix * rows * columns
    factors, pivots = jax.vmap(jax.scipy.linalg.lu_factor)(even)
    smallest = jnp.min(jnp.abs(jnp.diagonal(factors, axis1=-2, axis2=-1)), -1)
    solved = jax.vmap(lambda lu, p, b: jax.scipy.linalg.lu_solve((lu, p), b))(factors, pivots, rows * right)
    solved = jnp.swapaxes(columns, -1, -2) * solved
    # Written so that a NaN counts as singular.
    regular = (smallest > n * jnp.finfo(dtype).eps) & jnp.all(jnp.isfinite(solved), (-2, -1))
    return jnp.where(regular[:, None, None], solved, right), ~regular


def _inverse_size(matrix: Array, axis: int) -> Array:
    """1 over the largest entry along an axis, 1 for zeros."""
    largest = jnp.max(jnp.abs(matrix), axis, keepdims=True)
    return jnp.where(largest > 0, 1 / jnp.where(largest > 0, largest, 1), 1)
