"""The numbers of a retention curve: every kind of norm on every path."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rnncore._types import Array
from rnncore.analysis.jacobians.products import log_frobenius_norm, log_operator_norm, renormalise
from rnncore.analysis.paths._lstm_state import direct_retention, forget_logs, output_slope
from rnncore.analysis.retention._chains import Make, Measure, pull_back, push_forward
from rnncore.analysis.retention._inverse import log_smallest
from rnncore.analysis.retention._lanczos import top_right_vectors
from rnncore.analysis.run._alignment import ending_together, mask_missing
from rnncore.analysis.run.flat import (
    batch_major,
    columns_through,
    flat,
    flatten_carry,
    rows_through,
    state_dtype,
    state_size,
    time_major,
)
from rnncore.analysis.run.trajectory import Trajectory

AT_ONCE = 256
"""Steps, counted over all sequences, whose norms are computed together: bounds memory, keeps products large."""


def log_retention(
    traj: Trajectory, adjoint: Any, kind: str, path: str, anchor: str, lags: tuple[int, ...]
) -> tuple[Array, Array | None]:
    """(natural logarithms (*batch, L), booleans (*batch) for sequences without a gradient) of a checked call.

    The second is None for kinds other than "adjoint".
    """
    run = _ending_together(traj) if anchor == "end" else traj
    if path != "direct" and kind in ("operator", "rms"):
        logs, nothing = batch_major(run, _whole(run, kind, path, anchor, lags)), None
    else:
        logs, nothing = _compiled(run, adjoint, kind, path, anchor, lags)
    return mask_missing(traj, np.asarray(lags), logs, int(path == "cell")), nothing


_ending_together = jax.jit(ending_together)


@functools.partial(jax.jit, static_argnames=("kind", "path", "anchor", "lags"))
def _compiled(
    run: Trajectory, adjoint: Any, kind: str, path: str, anchor: str, lags: tuple[int, ...]
) -> tuple[Array, Array | None]:
    """All but the norms of whole matrices, whose loop stops now and then to reduce its rows."""
    if path == "direct":
        return _direct(run, adjoint, kind, anchor, lags)
    if kind == "bound":
        return _bound(run, path, anchor, lags), None
    if kind == "sigma_min":
        return batch_major(run, log_smallest(run, anchor, lags)), None
    sizes = batch_major(run, _adjoint(run, adjoint, path, (0, *lags) if lags[0] else lags))
    logs, nothing = _shares(sizes)
    return logs[..., -len(lags) :], nothing


def _shares(logs: Array) -> tuple[Array, Array]:
    """(logs minus those at lag 0, whether those are -inf); a gradient of 0 stays 0."""
    nothing = logs[..., 0] == -jnp.inf
    return jnp.where(nothing[..., None], -jnp.inf, logs - jnp.where(nothing, 0, logs[..., 0])[..., None]), nothing


def _whole(traj: Trajectory, kind: str, path: str, anchor: str, lags: tuple[int, ...]) -> Array:
    """Norms of M_k: the identity, or a part of it, goes through the steps."""
    count, n = math.prod(traj.batch_shape), state_size(traj)
    eye = jnp.eye(n, dtype=state_dtype(traj))
    if path == "state":
        block, make = jnp.broadcast_to(eye, (count, n, n)), _made(_all, kind)
        return pull_back(traj, block, make, None, lags) if anchor == "end" else push_forward(traj, block, make, lags)
    hidden, slope = n // 2, _slopes(traj)
    if anchor == "end":
        block = jnp.broadcast_to(eye[:hidden], (count, hidden, n))
        return pull_back(traj, block, _made(_cell_part, kind), slope, lags)
    tied = jax.vmap(jnp.diag)(slope[1])
    block = jnp.concatenate([jnp.broadcast_to(eye[:hidden, :hidden], tied.shape), tied], -1)
    return push_forward(traj, block, _made(_cells, kind), lags, start=1)


def _adjoint(traj: Trajectory, adjoint: Any, path: str, lags: tuple[int, ...]) -> Array:
    """A single row, the adjoint, goes through the steps."""
    row = flatten_carry(_merged(traj, adjoint), 1)[:, None, :].astype(state_dtype(traj))
    if path == "state":
        return pull_back(traj, row, _made(_all, "adjoint"), None, lags)
    return pull_back(traj, row, _made(_cell_part, "adjoint"), _slopes(traj), lags)


@functools.cache
def _made(make: Any, kind: str) -> Make:
    """The same object for each kind, so that its compiled code is found again."""
    return functools.partial(make, kind)


def _all(kind: str, traj: Trajectory) -> Measure:
    """The norm of the block."""
    return lambda rows, _: _norm(kind, rows)


def _cells(kind: str, traj: Trajectory) -> Measure:
    """The norm of the c part of columns [c; h]."""
    return lambda columns, _: _norm(kind, columns[..., : traj.cell.hidden_size])


def _cell_part(kind: str, traj: Trajectory) -> Measure:
    """The norm of rows [A B] as functions of c alone, with h tied to it: A + B Delta."""

    def measure(rows: Array, slope: Array) -> Array:
        cell, hidden = jnp.split(rows, 2, -1)
        return _norm(kind, cell + hidden * slope[:, None, :])

    return measure


def _norm(kind: str, matrix: Array) -> Array:
    if kind == "operator":
        return log_operator_norm(matrix)
    # Over the root of n, the number of columns of the square M.
    return log_frobenius_norm(matrix) - (math.log(matrix.shape[-1]) / 2 if kind == "rms" else 0.0)


@jax.jit
def _slopes(traj: Trajectory) -> Array:
    """Delta by carry, (T + 1, B, H); that of the initial carry is unknown, and its zeros are not used."""
    slope = time_major(traj, output_slope(traj))
    return jnp.concatenate([jnp.zeros_like(slope[:1]), slope])


def _bound(traj: Trajectory, path: str, anchor: str, lags: tuple[int, ...]) -> Array:
    """Sums of the logarithms of the norms of the step Jacobians, which are never formed."""
    top = lags[-1]
    first = traj.steps - top if anchor == "end" else int(path == "cell")
    chosen = jax.tree.map(lambda a: a[first : first + top], flat(traj).now)
    logs = _step_norms(traj, *chosen)
    if anchor == "end":
        logs = jnp.flip(logs, 0)
    logs = jnp.concatenate([jnp.zeros((1, logs.shape[1]), logs.dtype), jnp.cumsum(logs, 0)])[np.asarray(lags)]
    if path == "cell":
        slope = jnp.log1p(jnp.max(jnp.square(_slopes(traj)), -1)) / 2
        logs = logs + (slope[traj.steps - np.asarray(lags)] if anchor == "end" else slope[1])
    return batch_major(traj, logs)


def _step_norms(traj: Trajectory, states: Array, inputs: Any) -> Array:
    """ln of the operator norm of every step Jacobian, (steps, B); to rounding, see `top_right_vectors`."""
    steps, count, n = states.shape
    fixed = jax.lax.stop_gradient(traj)  # the vectors are constants to a derivative: that of the norm is exact
    step = flat(fixed).step
    push, pull, live = columns_through(step), rows_through(step), columns_through(flat(traj).step)

    def norms(now: Any) -> Array:
        def gram(v: Array) -> tuple[Array, Array]:
            held = jax.lax.stop_gradient(now)
            none = jnp.zeros(v.shape[0], jnp.int32)
            block, exponent = renormalise(jax.vmap(push)(*held, v[:, None, :]), none)
            block, exponent = renormalise(jax.vmap(pull)(*held, block), exponent)
            return block[:, 0], exponent

        found, _ = top_right_vectors(gram, now[0].shape[0], n, states.dtype)
        return log_frobenius_norm(jax.vmap(live)(*now, found[:, None, :]))

    if steps * count == 0:
        return jnp.zeros((steps, count), states.dtype)
    merged = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), (states, inputs))
    # Groups of one size; the last steps may be there twice.
    size = min(AT_ONCE, steps * count)
    starts = np.minimum(np.arange(0, steps * count, size), steps * count - size)
    with jax.default_matmul_precision("highest"):
        groups = starts[:, None] + np.arange(size)
        logs = jax.lax.map(norms, jax.tree.map(lambda a: a[groups], merged))
    return jnp.zeros(steps * count, states.dtype).at[groups].set(logs).reshape(steps, count)


def _direct(
    traj: Trajectory, adjoint: Any, kind: str, anchor: str, lags: tuple[int, ...]
) -> tuple[Array, Array | None]:
    """Norms of a diagonal matrix, from its logarithms."""
    logs = direct_retention(traj, anchor)
    if kind == "bound":
        single = jnp.max(forget_logs(traj, anchor), -1)
        single = jnp.concatenate([jnp.zeros_like(single[..., :1]), jnp.cumsum(single, -1)], -1)
        return single[..., np.asarray(lags)], None
    logs = logs[..., np.asarray(lags), :]
    if kind in ("operator", "sigma_min"):
        return (jnp.max if kind == "operator" else jnp.min)(logs, -1), None
    if kind == "rms":
        return (jax.nn.logsumexp(2 * logs, -1) - math.log(logs.shape[-1])) / 2, None
    tied = jnp.log(jnp.abs(adjoint.c + output_slope(traj)[..., -1, :] * adjoint.h))[..., None, :]
    sizes = jax.nn.logsumexp(2 * (jnp.concatenate([jnp.zeros_like(tied), logs], -2) + tied), -1) / 2
    shares, nothing = _shares(sizes)
    return shares[..., 1:], nothing


def _merged(traj: Trajectory, tree: Any) -> Any:
    """Arrays (*batch, ...) with the batch axes merged."""
    count, lead = math.prod(traj.batch_shape), len(traj.batch_shape)
    return jax.tree.map(lambda a: jnp.asarray(a).reshape(count, *a.shape[lead:]), tree)
