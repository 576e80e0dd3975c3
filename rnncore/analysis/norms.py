"""The numbers of a retention curve: every kind of norm on every path."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rnncore._types import Array
from rnncore.analysis.chains import Measure, pull_back, push_forward
from rnncore.analysis.lstm import direct_retention, output_slope
from rnncore.analysis.scaled import log_frobenius_norm, log_operator_norm
from rnncore.analysis.trajectory import Trajectory, batch_major, flat_step, flatten_carry, time_major, time_major_states


@functools.partial(jax.jit, static_argnames=("kind", "path", "anchor", "lags"))
def log_retention(traj: Trajectory, adjoint: Any, kind: str, path: str, anchor: str, lags: tuple[int, ...]) -> Array:
    """(*batch, L), natural logarithms, for arguments that `retention_curve` has checked."""
    if path == "direct":
        return _direct(traj, adjoint, kind, anchor, lags)
    if kind == "bound":
        return _bound(traj, path, anchor, lags)
    if kind == "adjoint":
        logs = _adjoint(traj, adjoint, path, (0, *lags) if lags[0] else lags)
        return batch_major(traj, (logs - logs[0])[-len(lags) :])
    return batch_major(traj, _whole(traj, kind, path, anchor, lags))


def _whole(traj: Trajectory, kind: str, path: str, anchor: str, lags: tuple[int, ...]) -> Array:
    """Norms of all of M_k: the identity, or its part, goes through the steps."""
    norm = log_operator_norm if kind == "operator" else _log_rms
    states = time_major_states(traj)
    _, count, n = states.shape
    eye = jnp.eye(n, dtype=states.dtype)
    if path == "state":
        block = jnp.broadcast_to(eye, (count, n, n))
        if anchor == "end":
            return pull_back(traj, block, lambda rows, _: norm(rows), None, lags)
        return push_forward(traj, block, lambda columns, _: norm(columns), lags)

    hidden, slope = n // 2, _slopes(traj)
    if anchor == "end":
        block = jnp.broadcast_to(eye[:hidden], (count, hidden, n))
        return pull_back(traj, block, _cell_part(norm), slope, lags)
    tied = jax.vmap(jnp.diag)(slope[1])
    block = jnp.concatenate([jnp.broadcast_to(eye[:hidden, :hidden], tied.shape), tied], -1)
    return push_forward(traj, block, lambda columns, _: norm(columns[..., :hidden]), lags, start=1)


def _adjoint(traj: Trajectory, adjoint: Any, path: str, lags: tuple[int, ...]) -> Array:
    """One row goes through the steps, the adjoint itself."""
    row = flatten_carry(_merged(traj, adjoint), 1)[:, None, :].astype(jnp.result_type(*jax.tree.leaves(traj.carries)))
    if path == "state":
        return pull_back(traj, row, lambda rows, _: log_frobenius_norm(rows), None, lags)
    return pull_back(traj, row, _cell_part(log_frobenius_norm), _slopes(traj), lags)


def _cell_part(norm: Any) -> Measure:
    """The norm of rows [A B] in terms of c alone, with h tied to it: A + B Delta."""

    def measure(rows: Array, slope: Array) -> Array:
        cell, hidden = jnp.split(rows, 2, -1)
        return norm(cell + hidden * slope[:, None, :])

    return measure


def _slopes(traj: Trajectory) -> Array:
    """Delta by carry, (T + 1, B, H); none belongs to the initial carry, and its zeros are not used."""
    slope = time_major(traj, output_slope(traj))
    return jnp.concatenate([jnp.zeros_like(slope[:1]), slope])


def _bound(traj: Trajectory, path: str, anchor: str, lags: tuple[int, ...]) -> Array:
    """Sums of the logarithms of the norms of formed step Jacobians, a step at a time."""
    step, top = flat_step(traj), lags[-1]
    first = traj.steps - top if anchor == "end" else int(path == "cell")
    states = time_major_states(traj)

    def norms(now: Any) -> Array:
        with jax.default_matmul_precision("highest"):
            return log_operator_norm(jax.vmap(jax.jacrev(step))(*now))

    chosen = jax.tree.map(lambda a: a[first : first + top], (states[:-1], time_major(traj, traj.zs)))
    logs = jax.lax.map(norms, chosen) if top else jnp.zeros((0, states.shape[1]), states.dtype)
    if anchor == "end":
        logs = jnp.flip(logs, 0)
    logs = jnp.concatenate([jnp.zeros_like(states[:1, :, 0]), jnp.cumsum(logs, 0)])[np.asarray(lags)]
    if path == "cell":
        slope = jnp.log1p(jnp.max(jnp.square(_slopes(traj)), -1)) / 2
        logs = logs + (slope[traj.steps - np.asarray(lags)] if anchor == "end" else slope[1])
    return batch_major(traj, logs)


def _direct(traj: Trajectory, adjoint: Any, kind: str, anchor: str, lags: tuple[int, ...]) -> Array:
    """Norms of a diagonal matrix, from its logarithms."""
    logs = direct_retention(traj, anchor)
    if kind == "bound":
        single = jnp.max(jnp.log(jnp.abs(traj.gates.f)), -1)
        single = jnp.flip(single, -1) if anchor == "end" else single
        return jnp.concatenate([jnp.zeros_like(single[..., :1]), jnp.cumsum(single, -1)], -1)[..., np.asarray(lags)]
    if kind == "operator":
        return jnp.max(logs, -1)[..., np.asarray(lags)]
    if kind == "rms":
        return (jax.nn.logsumexp(2 * logs, -1) - math.log(logs.shape[-1]))[..., np.asarray(lags)] / 2
    tied = adjoint.c + output_slope(traj)[..., -1, :] * adjoint.h
    squares = jax.nn.logsumexp(2 * (logs + jnp.log(jnp.abs(tied))[..., None, :]), -1) / 2
    return (squares - squares[..., :1])[..., np.asarray(lags)]


def _log_rms(matrix: Array) -> Array:
    """ln of ||M||_F / sqrt(n), n the number of columns of the square M."""
    return log_frobenius_norm(matrix) - math.log(matrix.shape[-1]) / 2


def _merged(traj: Trajectory, tree: Any) -> Any:
    """Arrays (*batch, ...) with the batch axes merged."""
    count, lead = math.prod(traj.batch_shape), len(traj.batch_shape)
    return jax.tree.map(lambda a: jnp.asarray(a).reshape(count, *a.shape[lead:]), tree)
