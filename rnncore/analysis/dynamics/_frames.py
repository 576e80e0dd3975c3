"""Orthonormal frames carried through step Jacobians and orthonormalised again: the core of every spectrum.

A frame of k vectors is stored as rows (B, k, n).  The diagonal of R in its QR decomposition is the stretch of
each vector.  A vector whose stretch is below rounding is lost and stays lost: the rank of a product never
grows again.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rnncore._types import Array
from rnncore.analysis.jacobians.products import nats, renormalise
from rnncore.analysis.run.flat import Step, Through, columns_through, rows_through

ROUNDING = 8.0
"""Times eps: a number below that fraction of the size of its row is rounding error."""


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def first_frame(key: Array, n: int, k: int, dtype: Any) -> Array:
    """k random orthonormal rows (k, n); the first k of a larger frame of the same key."""
    rows = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i), (n,), dtype, -1, 1))(jnp.arange(k))
    return jnp.linalg.qr(rows.T)[0].T


def graded_qr(block: Array, tolerance: float) -> tuple[Array, Array, Array]:
    """QR of columns given as rows, accurate even if the entries of a column span many decades.

    Householder reflections keep the relative error of every row small if the large rows come first, so rows
    are sorted: those of diag(phi') U differ widely where units saturate.

    Args:
      block: (B, k, n).
      tolerance: 1 for the rounding error of the dtype, 0 for none.

    Returns:
      (orthonormal rows (B, k, n), R (B, k, k), lost (B, k)); lost: whether the vector, or one before it, lies in
      the span of its predecessors up to rounding.
    """
    columns = jnp.swapaxes(block, -1, -2)
    order = jnp.argsort(-jnp.max(jnp.abs(columns), -1), -1)
    q, r = jnp.linalg.qr(_rows_at(columns, order))
    q = _rows_at(q, jnp.argsort(order, -1))
    pivots = jnp.diagonal(r, axis1=-2, axis2=-1)
    stretch = jnp.abs(pivots)
    # Each column is rounded in proportion to the size of its rows, and passes its error on to later ones.
    unit = jnp.triu(r, 1) / jnp.where(stretch > 0, pivots, 1)[..., None]
    eye = jnp.broadcast_to(jnp.eye(r.shape[-1], dtype=r.dtype), r.shape)
    weights = jax.lax.linalg.triangular_solve(unit + eye, eye, left_side=True, unit_diagonal=True)
    noise = jnp.einsum("...nk,...n->...k", jnp.abs(q), jnp.sqrt(jnp.sum(jnp.square(columns), -1)))
    noise = noise * jnp.sum(jnp.abs(weights), -2)
    # NaN and infinity do not count as lost: they have to show.
    lost = (stretch <= tolerance * ROUNDING * float(jnp.finfo(block.dtype).eps) * noise) & jnp.isfinite(stretch)
    return jnp.swapaxes(q, -1, -2), r, jnp.cumsum(lost, -1) > 0


def _rows_at(a: Array, places: Array) -> Array:
    return jnp.take_along_axis(a, places[..., None], -2, mode="promise_in_bounds")


def through(step: Step, direction: str) -> Through:
    """(state, z, rows (k, n)) to the rows of the frame after the step; no Jacobian is formed."""
    return (columns_through if direction == "forward" else rows_through)(step)


def matrix_of(step: Step, direction: str) -> Step:
    """(state, z) to the matrix that multiplies a row of the frame in the step: J^T or, backward, J."""
    return lambda state, z: through(step, direction)(state, z, jnp.eye(state.shape[0], dtype=state.dtype))


def qr_times(steps: int, burn_in: int, qr_every: int) -> np.ndarray:
    """The steps, counted from 1, after which the frame is orthonormalised; both ends are among them."""
    times = np.arange(1, steps + 1)
    return times[(times == burn_in) | (times == steps) | ((times - burn_in) % qr_every == 0)]


def log_stretches(
    step: Step, states: Array, zs: Any, frame: Array, times: np.ndarray, direction: str, tolerance: float
) -> tuple[Array, Array | None]:
    """Carries a frame along a run.

    Args:
      states: (T, B, n), the state before every step.
      zs: arrays (T, B, ...).
      frame: (k, n); with k = n the Jacobians are formed, one at a time.
      times: of `qr_times`.

    Returns:
      (ln of the stretch of every vector since the QR before (len(times), B, k),
      ln |det J_t| (T, B) in the order in which the steps were taken, or None if k < n).
    """
    count, n = states.shape[1:]
    full = frame.shape[0] == n
    wanted = np.isin(np.arange(1, len(states) + 1), times)
    matrix, pushed = jax.vmap(matrix_of(step, direction)), jax.vmap(through(step, direction))

    def orthonormal(block: Array, exponent: Array, lost: Array) -> Any:
        block, r, now = graded_qr(block, tolerance)
        lost = lost | now
        stretch = jnp.where(lost, 1.0, jnp.abs(jnp.diagonal(r, axis1=-2, axis2=-1)))
        logs = jnp.where(lost, -jnp.inf, jnp.log(stretch) + nats(exponent, r.dtype)[:, None])
        return (block, jnp.zeros_like(exponent), lost), logs

    def one(carry: Any, now: Any) -> Any:
        block, exponent, lost = carry
        (state, z), want = now
        if full:
            jacobian = matrix(state, z)
            block, log_det = block @ jacobian, log_abs_det(jacobian)
        else:
            block, log_det = pushed(state, z, block), None
        block, exponent = renormalise(block, exponent)
        nothing = jnp.zeros(lost.shape, block.dtype)
        carry, logs = jax.lax.cond(want, orthonormal, lambda *same: (same, nothing), block, exponent, lost)
        return carry, (logs, log_det)

    start = (
        jnp.broadcast_to(frame, (count, *frame.shape)),
        jnp.zeros((count,), jnp.int32),
        jnp.zeros((count, frame.shape[0]), bool),
    )
    now = jax.tree.map(lambda a: jnp.flip(a, 0), (states, zs)) if direction == "backward" else (states, zs)
    with jax.default_matmul_precision("highest"):
        _, (logs, log_dets) = jax.lax.scan(one, start, (now, jnp.asarray(wanted)))
    return logs[times - 1], log_dets


def log_abs_det(matrix: Array) -> Array:
    """ln |det| of (..., n, n); -inf where it is singular up to rounding and scaling of rows and columns."""
    rows = jnp.max(jnp.abs(matrix), -1, keepdims=True)
    matrix = matrix / jnp.where(rows > 0, rows, 1)
    columns = jnp.max(jnp.abs(matrix), -2, keepdims=True)
    matrix = matrix / jnp.where(columns > 0, columns, 1)
    pivots = jnp.abs(jnp.diagonal(jax.lax.linalg.lu(matrix)[0], axis1=-2, axis2=-1))
    singular = jnp.any(pivots <= ROUNDING * float(jnp.finfo(matrix.dtype).eps), -1)
    logs = [jnp.sum(jnp.log(jnp.where(a > 0, a, 1)), -1) for a in (pivots, rows[..., 0], columns[..., 0, :])]
    return jnp.where(singular, -jnp.inf, sum(logs))


def exact_sum(a: Array) -> Array:
    """Sum over the first axis by halves: the error grows with the logarithm of its length."""
    while len(a) > 1:
        half, odd = divmod(len(a), 2)
        pairs = a[:half] + a[half : 2 * half]
        a = jnp.concatenate([pairs, a[2 * half :]]) if odd else pairs
    return a[0]
