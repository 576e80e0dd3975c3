"""Lyapunov exponents along a stored run, and of any map."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rnncore._types import Array, PyTree
from rnncore.analysis.dynamics._frames import exact_sum, first_frame, log_stretches, qr_times
from rnncore.analysis.dynamics.lyapunov_result import LyapunovResult
from rnncore.analysis.run.flat import Step, flat, state_dtype, state_size
from rnncore.analysis.run.trajectory import Trajectory, check_finite, refuse_ragged


def lyapunov_exponents(
    traj: Trajectory,
    k: int | None = None,
    *,
    qr_every: int = 1,
    burn_in: int = 0,
    direction: str = "forward",
    key: Array | None = None,
    rank_tolerance: float = 1.0,
) -> LyapunovResult:
    """The k largest Lyapunov exponents of a run driven by its inputs, by repeated QR.

    Q_t R_t = J_t Q_{t-1},   lambda_i = mean over t of ln |R_t,ii|

    With k < n a frame of k columns goes through `jax.linearize` of the step and no Jacobian is formed: memory is
    that of the trajectory and a few (n, k) arrays.  All n exponents take one (n, n) Jacobian at a time.

    An exponent is -inf where the product of Jacobians has lost that direction: exactly, as for dead relu
    units or U = 0, or because its stretch in a step is below the rounding of the others, as happens in
    float32 to the smallest exponents of a saturated network; float64 resolves them.  With k < n only the k
    vectors are compared: a step that loses all of them to rounding goes unnoticed; k=None detects it.

    Args:
      traj: a trajectory of T steps.
      k: how many; None for all n, the number of entries of the state (2 H for an LSTM).
      qr_every: steps from one QR to the next.  1 is the most accurate; more is cheaper, but directions that shrink by
        1/eps relative to the largest within that many steps are lost.
      burn_in: first steps (last ones, backward) that align the frame but do not count.
      direction: "forward", or "backward" through `jax.vjp` from the end: the same exponents as T goes to infinity,
        computed from other numbers, which serves as a check.
      key: for the random first frame; `jax.random.key(0)` by default.
      rank_tolerance: a stretch below that many rounding errors of its rows is -inf; 0 keeps whatever number
        rounding leaves.

    Returns:
      `LyapunovResult` with exponents (*batch, k).

    Raises:
      ValueError: k above n, a burn_in that leaves no step, unknown options; a Jacobian that overflows.
      NotImplementedError: a trajectory with lengths or resets; exponents belong to an uninterrupted run.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import analysis
      >>> cell = rnncore.Elman(4, activation_fn=jax.nn.identity)  # its initial U is orthogonal
      >>> run = analysis.trajectory(cell, cell.init(jax.random.key(0), 3), jnp.ones((50, 3)))
      >>> bool(jnp.abs(analysis.lyapunov_exponents(run).exponents).max() < 1e-5)
      True

    Source: Benettin, Galgani, Giorgilli and Strelcyn (1980); for driven recurrent networks Engelken, Wolf
    and Abbott (2020), arXiv:2006.02427, and Vogt et al. (2020), arXiv:2006.14123.
    """
    call = "lyapunov_exponents"
    refuse_ragged(traj, call)
    n, dtype = state_size(traj), state_dtype(traj)
    options = _check(call, n, dtype, traj.steps, k, qr_every, burn_in, direction, key, rank_tolerance)
    return _seen(call, _of_trajectory(traj, *options))


def lyapunov_exponents_of_map(
    step: Step,
    state: Array,
    inputs: PyTree = None,
    *,
    steps: int | None = None,
    k: int | None = None,
    qr_every: int = 1,
    burn_in: int = 0,
    direction: str = "forward",
    key: Array | None = None,
    rank_tolerance: float = 1.0,
) -> LyapunovResult:
    """The Lyapunov exponents of any map, autonomous or driven, run from a state.

    s_t = step(s_{t-1}, x_t),   J_t = d s_t / d s_{t-1},   the rest as in `lyapunov_exponents`

    Args:
      step: (state (n,), one input) to the next state (n,).  Define it once: every new function object is
        compiled anew.
      state: (*batch, n), the initial state.
      inputs: arrays (T, ...), shared by the batch; None for a map without inputs.
      steps: T; required without inputs.
      k, qr_every, burn_in, direction, key, rank_tolerance: as in `lyapunov_exponents`.  Here burn_in also lets the
        orbit reach the attractor.

    Returns:
      `LyapunovResult` with exponents (*batch, k).

    Raises:
      ValueError: as `lyapunov_exponents`; a state that is not floating point; both or neither of inputs and
        steps; an orbit that leaves the floating-point range.

    Example:
      >>> import jax.numpy as jnp
      >>> from rnncore import analysis
      >>> def cat(s, _):
      ...     return jnp.mod(jnp.array([[2.0, 1.0], [1.0, 1.0]]) @ s, 1.0)
      >>> result = analysis.lyapunov_exponents_of_map(cat, jnp.array([0.1, 0.3]), steps=200, burn_in=20)
      >>> [round(x, 4) for x in result.exponents.tolist()]
      [0.9624, -0.9624]
    """
    call = "lyapunov_exponents_of_map"
    state = jnp.asarray(state)
    if state.ndim < 1 or not jnp.issubdtype(state.dtype, jnp.floating):
        raise ValueError(f"`{call}(state=<{state.dtype} {state.shape}>)`: expected floating point (*batch, n).")
    check_finite(f"{call}(state=...)", state)
    leaves = jax.tree.leaves(inputs)
    if (steps is None) != bool(leaves):
        raise ValueError(f"`{call}`: expected either inputs, whose first axis is T, or steps=T.")
    total = steps if steps is not None else leaves[0].shape[0]
    options = _check(call, state.shape[-1], state.dtype, total, k, qr_every, burn_in, direction, key, rank_tolerance)
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a)[1:], jnp.result_type(a)), inputs)
    out = jax.eval_shape(step, jax.ShapeDtypeStruct(state.shape[-1:], state.dtype), one)
    if (out.shape, out.dtype) != (state.shape[-1:], state.dtype):
        raise ValueError(
            f"`{call}(step)`: returned {out.dtype} {out.shape} for a state {state.dtype} {state.shape[-1:]}; "
            "expected the same, for one state without batch axes."
        )
    return _seen(call, _of_map(step, state, inputs, total, *options))


def finite_time_lyapunov(
    traj: Trajectory,
    window: int,
    k: int | None = None,
    *,
    burn_in: int = 0,
    direction: str = "forward",
    key: Array | None = None,
) -> Array:
    """Lyapunov exponents over consecutive windows of a run, along a single frame.

    lambda_i(w) = (1 / window) * sum over the steps of window w of ln |R_t,ii|

    These are not the logarithms of singular values of the windows' products, which are `singular_spectrum`
    over the lag and agree for long windows only.

    Args:
      traj: a trajectory of T steps.
      window: steps of a window; a remainder at the end is left out.
      k, burn_in, direction, key: as in `lyapunov_exponents`; backward, the first window is the last in time.

    Returns:
      (*batch, W, k), W = (T - burn_in) // window.

    Raises:
      ValueError: a window longer than the steps after burn_in; as `lyapunov_exponents`.
      NotImplementedError: as `lyapunov_exponents`.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import analysis
      >>> cell = rnncore.LSTM(4)
      >>> run = analysis.trajectory(cell, cell.init(jax.random.key(0), 3), jnp.ones((2, 50, 3)))
      >>> analysis.finite_time_lyapunov(run, 20, k=3, burn_in=10).shape
      (2, 2, 3)
    """
    refuse_ragged(traj, "finite_time_lyapunov")
    left = traj.steps - burn_in
    if not isinstance(window, int | np.integer) or not 1 <= window <= left:
        raise ValueError(
            f"`finite_time_lyapunov(window={window}, burn_in={burn_in})`: a run of T = {traj.steps} steps leaves "
            f"{left}; expected a window of 1 to that many steps."
        )
    local = lyapunov_exponents(traj, k, burn_in=burn_in, direction=direction, key=key).local
    count = left // int(window)
    windows = local[..., : count * window, :].reshape(*local.shape[:-2], count, window, local.shape[-1])
    return exact_sum(jnp.moveaxis(windows, -2, 0)) / window


def _check(
    call: str, n: int, dtype: Any, steps: int, k: Any, qr_every: int, burn_in: int, direction: str, key: Any,
    tolerance: float,
) -> tuple[Any, ...]:  # fmt: skip
    """All checks of a call; returns the arguments of `_spectrum` that are not the run, the first frame first."""
    for name, value in (("k", k), ("qr_every", qr_every), ("burn_in", burn_in)):
        try:
            operator.index(0 if name == "k" and value is None else value)
        except TypeError:
            raise ValueError(f"`{call}({name}={value!r})`: expected an integer.") from None
    if k is not None and not 1 <= k <= n:
        raise ValueError(f"`{call}(k={k})`: the state has n = {n} entries; expected 1 to {n}, or None for all.")
    if qr_every < 1:
        raise ValueError(f"`{call}(qr_every={qr_every})`: expected at least 1 step.")
    if not 0 <= burn_in < steps:
        raise ValueError(
            f"`{call}(burn_in={burn_in})`: of T = {steps} steps at least one must count; run a longer sequence or "
            "leave out fewer steps."
        )
    if direction not in ("forward", "backward"):
        raise ValueError(f"`{call}(direction={direction!r})`: expected 'forward' or 'backward'.")
    if not tolerance >= 0:
        raise ValueError(f"`{call}(rank_tolerance={tolerance})`: expected at least 0.")
    key = jax.random.key(0) if key is None else key
    frame = first_frame(key, n, n if k is None else int(k), dtype)
    return frame, int(qr_every), int(burn_in), direction, float(tolerance)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _of_trajectory(traj: Trajectory, frame: Array, *options: Any) -> LyapunovResult:
    return _spectrum(*flat(traj), traj.batch_shape, frame, *options)


@functools.partial(jax.jit, static_argnums=(0, 3, 5, 6, 7, 8))
def _of_map(step: Step, state: Array, inputs: PyTree, steps: int, frame: Array, *options: Any) -> LyapunovResult:
    start = state.reshape(-1, state.shape[-1])

    def move(now: Array, x: Any) -> tuple[Array, Array]:
        return jax.vmap(step, (0, None))(now, x), now

    with jax.default_matmul_precision("highest"):
        last, states = jax.lax.scan(move, start, inputs, length=steps)
    copies = jax.tree.map(lambda a: jnp.broadcast_to(a[:, None], (steps, len(start), *a.shape[1:])), inputs)
    result = _spectrum(step, states, copies, state.shape[:-1], frame, *options)
    # A constant Jacobian would not show an orbit that overflows.
    broken = ~jnp.all(jnp.isfinite(last), -1).reshape(state.shape[:-1])
    return dataclasses.replace(result, exponents=jnp.where(broken[..., None], jnp.nan, result.exponents))


def _spectrum(
    step: Step, states: Array, zs: Any, batch: tuple[int, ...], frame: Array,
    qr_every: int, burn_in: int, direction: str, tolerance: float,
) -> LyapunovResult:  # fmt: skip
    """The exponents of a checked call; time-major (T, B, n) in, batch-major out."""
    steps, _, n = states.shape
    k = frame.shape[0]
    times = qr_times(steps, burn_in, qr_every)
    logs, log_dets = log_stretches(step, states, zs, frame, times, direction, tolerance)
    logs, times = logs[times > burn_in], times[times > burn_in] - burn_in
    lengths = np.diff(times, prepend=0).astype(states.dtype)[:, None, None]
    exponents = exact_sum(logs) / (steps - burn_in)
    residual = None
    if log_dets is not None:
        mean, total = exact_sum(log_dets[burn_in:]) / (steps - burn_in), jnp.sum(exponents, -1)
        both = jnp.isneginf(mean) & jnp.isneginf(total)
        residual = jnp.where(both, 0.0, total - jnp.where(both, 0.0, mean)).reshape(batch)
    return LyapunovResult(
        exponents=exponents.reshape(*batch, k),
        local=jnp.moveaxis(logs / lengths, 0, 1).reshape(*batch, len(times), k),
        standard_error=_standard_error(logs, lengths).reshape(*batch, k),
        sum_rule_residual=residual,
        times=tuple(times.tolist()),
        n=n,
        direction=direction,
        dtype=states.dtype.name,
    )


def _standard_error(logs: Array, lengths: np.ndarray) -> Array:
    """Of the mean over the first axis, from means of blocks, as neighbouring steps are correlated."""
    blocks = math.isqrt(len(logs))
    if blocks < 2:
        return jnp.full(logs.shape[1:], jnp.inf, logs.dtype)
    size = len(logs) // blocks
    lost = jnp.any(jnp.isneginf(logs), 0)

    def sums(a: Any) -> Array:
        return jnp.sum(a[-blocks * size :].reshape(blocks, size, *a.shape[1:]), 1)

    means = sums(jnp.where(lost, 0.0, logs)) / sums(lengths)
    return jnp.where(lost, 0.0, jnp.std(means, 0, ddof=1) / math.sqrt(blocks))


def _seen(call: str, result: LyapunovResult) -> LyapunovResult:
    """Refuses NaN and +inf unless traced; -inf is a valid result."""
    if not isinstance(result.exponents, jax.core.Tracer) and not np.all(np.asarray(result.exponents) < np.inf):
        raise ValueError(
            f"`{call}`: a state or the Jacobian of a step leaves the range of {result.dtype}; shorten the run, or use "
            "float64."
        )
    return result
