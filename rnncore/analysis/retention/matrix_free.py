"""Norms of a product of many Jacobians from its action on vectors, for states too large to form it."""

from __future__ import annotations

import functools
import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rnncore._types import Array
from rnncore.analysis.jacobians.products import log_frobenius_norm, nats
from rnncore.analysis.retention._chains import carry_block
from rnncore.analysis.retention._lanczos import top_right_vectors
from rnncore.analysis.run._alignment import check_lag, ending_together, mask_missing
from rnncore.analysis.run._shown import shown
from rnncore.analysis.run.flat import Flat, columns_through, flat, rows_through
from rnncore.analysis.run.trajectory import Trajectory


class NormEstimate(NamedTuple):
    """An estimate of a norm and its error.

    Fields:
      log_norm: (*batch), natural logarithm; -inf where the product is exactly 0.
      error: (*batch), of log_norm, that is relative to the norm: the standard error for `frobenius_norm`, a bound
        from the last residual for `operator_norm`.
    """

    log_norm: Array
    error: Array

    def __repr__(self) -> str:
        return shown(self)

    @property
    def log10(self) -> Array:
        """log10 of the norm, (*batch)."""
        return self.log_norm / math.log(10.0)


def frobenius_norm(
    traj: Trajectory, lag: int, *, anchor: str = "end", probes: int = 64, key: Array | None = None
) -> NormEstimate:
    """The Frobenius norm ||P_k||_F of a product over k steps, estimated from random vectors.

    ||P||_F^2 = E ||P v||^2,   v of independent random signs;   P_k = J_T ... J_{T-k+1} or, from the start, J_k ... J_1

    Costs the memory and time of `probes` vectors through k steps, whatever the size n of the state; the relative
    standard error of the norm is at most 1 / sqrt(2 probes), and much less if many directions survive.
    Divided by sqrt(n) it estimates `retention_curve(kind="rms")`.

    Args:
      traj: a trajectory of T steps.
      lag: k, up to the length of the shortest sequence.
      anchor: "end" or "start".
      probes: the number of random vectors, at least 2.
      key: for the random vectors; `jax.random.key(0)` by default.

    Returns:
      `NormEstimate` of arrays (*batch).

    Raises:
      ValueError: a lag above the length of the trajectory, unknown anchor, fewer than two probes.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import analysis
      >>> cell = rnncore.Elman(4, activation_fn=jax.nn.identity)  # its initial U is orthogonal
      >>> run = analysis.trajectory(cell, cell.init(jax.random.key(0), 3), jnp.ones((50, 3)))
      >>> round(float(jnp.exp(analysis.frobenius_norm(run, 50).log_norm)), 4)
      2.0

    Source: Hutchinson (1990), "A stochastic estimator of the trace of the influence matrix".
    """
    lag = check_lag("frobenius_norm", traj, lag, anchor)
    if operator.index(probes) < 2:
        raise ValueError(f"`frobenius_norm(probes={probes})`: expected at least 2, whose spread is the error.")
    return _frobenius(traj, jax.random.key(0) if key is None else key, lag, anchor, operator.index(probes))


def operator_norm(traj: Trajectory, lag: int, *, anchor: str = "end") -> NormEstimate:
    """The operator norm ||P_k||_2 of a product over k steps, from its action on vectors.

    P_k = J_T ... J_{T-k+1} or, from the start, J_k ... J_1.  The Lanczos iteration finds its largest singular value,
    up to rounding, from forward and backward products with vectors (jvp and vjp of the k steps).

    Args:
      traj: a trajectory of T steps.
      lag: k, up to the length of the shortest sequence.
      anchor: "end" or "start".

    Returns:
      `NormEstimate` of arrays (*batch).

    Raises:
      ValueError: a lag above the length of the trajectory; unknown anchor.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import analysis
      >>> cell = rnncore.LSTM(4)
      >>> run = analysis.trajectory(cell, cell.init(jax.random.key(0), 3), jnp.ones((2, 50, 3)))
      >>> curve = analysis.retention_curve(run, kind="operator", lags=[50])
      >>> bool(jnp.allclose(analysis.operator_norm(run, 50).log_norm, curve.log_retention[:, 0], rtol=1e-4))
      True
    """
    return _operator(traj, check_lag("operator_norm", traj, lag, anchor), anchor)


def _steps(traj: Trajectory, lag: int, anchor: str) -> tuple[Flat, Any]:
    """(run, (state, inputs) of the steps of the product, first to last)."""
    run = flat(ending_together(traj) if anchor == "end" else traj)
    first = traj.steps - lag if anchor == "end" else 0
    return run, jax.tree.map(lambda a: a[first : first + lag], run.now)


@functools.partial(jax.jit, static_argnames=("lag", "anchor", "probes"))
def _frobenius(traj: Trajectory, key: Array, lag: int, anchor: str, probes: int) -> NormEstimate:
    run, now = _steps(traj, lag, anchor)
    _, count, n = now[0].shape
    signs = jax.random.rademacher(key, (count, probes, n), now[0].dtype)
    block, exponent = carry_block(columns_through(run.step), signs, now)
    squares = jnp.sum(jnp.square(block), -1)
    mean = jnp.mean(squares, -1)
    error = jnp.std(squares, -1, ddof=1) / math.sqrt(probes) / (2 * jnp.where(mean > 0, mean, 1))
    return _estimate(traj, lag, jnp.log(mean) / 2 + nats(exponent, mean.dtype), error)


@functools.partial(jax.jit, static_argnames=("lag", "anchor"))
def _operator(traj: Trajectory, lag: int, anchor: str) -> NormEstimate:
    run, now = _steps(traj, lag, anchor)
    _, count, n = now[0].shape
    # The vectors are constants to a derivative.
    fixed, held = jax.lax.stop_gradient((ending_together(traj) if anchor == "end" else traj, now))
    step = flat(fixed).step
    upside_down = jax.tree.map(lambda a: jnp.flip(a, 0), held)

    def gram(v: Array) -> tuple[Array, Array]:
        block, there = carry_block(columns_through(step), v[:, None, :], held)
        block, back = carry_block(rows_through(step), block, upside_down)
        return block[:, 0], there + back

    found, residual = top_right_vectors(gram, count, n, now[0].dtype)
    block, exponent = carry_block(columns_through(run.step), found[:, None, :], now)
    return _estimate(traj, lag, log_frobenius_norm(block) + nats(exponent, block.dtype), residual / 2)


def _estimate(traj: Trajectory, lag: int, log_norm: Array, error: Array) -> NormEstimate:
    log_norm, error = (a.reshape(traj.batch_shape) for a in (log_norm, error))
    return NormEstimate(mask_missing(traj, [lag], log_norm[..., None])[..., 0], error)
