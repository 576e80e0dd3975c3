"""Retention of the gradient over many steps, for every choice of path and norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rnncore._types import Array
from rnncore.analysis.paths._lstm_state import lstm_of
from rnncore.analysis.retention._norms import log_retention
from rnncore.analysis.retention.bounds import gradient_bound
from rnncore.analysis.retention.curve import RetentionCurve
from rnncore.analysis.run._alignment import chosen_lags, mask_missing, shortest
from rnncore.analysis.run.flat import state_dtype, state_size
from rnncore.analysis.run.trajectory import Trajectory, check_finite, check_trajectory

NORMS = {
    "operator": "largest singular value",
    "rms": "Frobenius norm over the root of n",
    "sigma_min": "smallest singular value",
    "adjoint": "Euclidean norm of the pulled-back adjoint over that at lag 0",
    "bound": "product of the operator norms of the single steps",
    "a_priori_bound": "power of max |phi'| times the operator norm of U",
}
PATHS = ("state", "cell", "direct")


def retention_curve(
    traj: Trajectory,
    *,
    kind: str = "rms",
    path: str = "state",
    lags: int | Sequence[int] | None = None,
    anchor: str = "end",
    adjoint: Any = None,
    slope: float | None = None,
) -> RetentionCurve:
    """How much of a gradient survives k steps back, for every lag k.

    path "state":  M_k = d s_T / d s_{T-k} = P_k = J_T J_{T-1} ... J_{T-k+1}
    path "cell":   M_k = d c_T / d c_{T-k} = [I 0] P_k [I; Delta_{T-k}],   Delta_t = d h_t / d c_t
    path "direct": M_k = diag(f_T f_{T-1} ... f_{T-k+1})

    The cell path is the total derivative: h_{T-k} moves with c_{T-k}, at a fixed pre-activation of the
    output gate (with peepholes Delta includes how that gate depends on c).  It is not the product of the
    one-step derivatives d c_t / d c_{t-1}, because c_k also reaches c_{k+2} through the output gate of
    step k + 1.  The direct path holds every h fixed: see `direct_retention`.

    Args:
      traj: a trajectory of T steps.
      kind:
        "operator", the largest singular value of M_k.
        "rms", ||M_k||_F / sqrt(n): the root of the mean over all directions.
        "sigma_min", the smallest singular value of M_k, for the direction that loses most.  -inf where a step
        Jacobian is singular to working precision; not on the cell path.
        "adjoint", ||M_k^T v|| / ||M_0^T v|| for the gradient v of one loss term in the last state.
        "bound", the product of the operator norms of the single step Jacobians (of max f_t on the direct
        path); on the cell path times sqrt(1 + max Delta^2), since ||[I 0] P [I; Delta]|| is at most that.
        "a_priori_bound", `gradient_bound`^k, for Elman networks, path "state" only.
      path: "state", all of the carry; "cell" and "direct", LSTM only.
      lags: increasing integers; an integer K for 0 to K; None for all.  At most T; at most T - 1 on the
        cell path, because no output gate belongs to the initial carry.  With lengths the shortest sequence
        takes the place of T, so that means over the batch are over the same sequences at every lag; pick
        the longer ones by `traj.take`.  Inside jit lengths cannot be seen, and lags that a sequence
        does not have are +inf.
      anchor: "end", the last state in terms of earlier ones, as in backpropagation; "start", later states
        in terms of the first, s_k in terms of s_0.  The cell path starts at c_1.
      adjoint: v = dl / ds_T in the structure of the carry, arrays (*batch, H): `jax.grad` of the loss
        at `traj.last`.  On the cell and direct paths its cell part, with h_T tied to c_T, counts.
      slope: of "a_priori_bound", as in `gradient_bound`.

    Returns:
      `RetentionCurve` with log_retention (*batch, L).  A sequence whose adjoint is zero is -inf throughout and named
      in `without_gradient`.

    Raises:
      ValueError: unknown options, lags above the length of the trajectory, a cell without a cell state, an adjoint
        of another structure, or 0 in every sequence.
      NotImplementedError: the cell and direct paths of cells other than the LSTM, "a_priori_bound" of cells other
        than Elman networks.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import analysis
      >>> cell = rnncore.Elman(4, activation_fn=jax.nn.identity)  # its initial U is orthogonal
      >>> run = analysis.trajectory(cell, cell.init(jax.random.key(0), 3), jnp.ones((2, 50, 3)))
      >>> curve = analysis.retention_curve(run, lags=(0, 10, 50))
      >>> curve.log_retention.shape, bool(jnp.abs(curve.log10).max() < 1e-4)
      ((2, 3), True)

    Source: Pascanu, Mikolov and Bengio (2013), arXiv:1211.5063; Hochreiter and Schmidhuber (1997).
    """
    chosen = _check(traj, kind, path, lags, anchor, adjoint)
    if kind == "a_priori_bound":
        logs = jnp.log(gradient_bound(traj.cell, traj.params, slope=slope)) * np.asarray(chosen)
        # A bound of 0 over 0 steps would be -inf * 0.
        logs = jnp.broadcast_to(jnp.where(np.asarray(chosen) == 0, 0.0, logs), (*traj.batch_shape, len(chosen)))
        logs, without_gradient = mask_missing(traj, np.asarray(chosen), logs), None
    else:
        logs, without_gradient = log_retention(traj, adjoint, kind, path, anchor, chosen)
    _check_result(kind, logs, without_gradient)
    return RetentionCurve(
        lags=jnp.asarray(chosen, jnp.int32),
        log_retention=logs,
        kind=kind,
        path=path,
        anchor=anchor,
        norm=NORMS[kind],
        n=state_size(traj) if path == "state" else traj.cell.hidden_size,
        dtype=state_dtype(traj).name,
        without_gradient=without_gradient,
    )


def _check(traj: Trajectory, kind: str, path: str, lags: Any, anchor: str, adjoint: Any) -> tuple[int, ...]:
    """All checks of a call; returns the lags."""
    check_trajectory("retention_curve", traj)
    for name, value, allowed in (("kind", kind, NORMS), ("path", path, PATHS), ("anchor", anchor, ("end", "start"))):
        if value not in allowed:
            raise ValueError(f"`retention_curve({name}={value!r})`: expected one of {', '.join(map(repr, allowed))}.")
    if path != "state":
        lstm_of(traj, f"retention_curve(path={path!r})")
        if kind == "a_priori_bound":
            raise NotImplementedError(
                f"`retention_curve(kind='a_priori_bound', path={path!r})`: a bound from the weights alone is known for "
                "Elman networks; use kind='bound'."
            )
    if kind == "sigma_min" and path == "cell":
        raise NotImplementedError(
            "`retention_curve(kind='sigma_min', path='cell')`: the smallest singular value of a block of a product "
            "is lost in the rounding of its largest; use path='state' or path='direct'."
        )
    steps = shortest(traj)
    most = max(steps - (path == "cell"), 0)
    chosen = chosen_lags("retention_curve", most if lags is None else lags)
    if chosen[-1] > most:
        why = ", the first carry has no output gate" if path == "cell" else ""
        call = f"`retention_curve(path={path!r}, lags up to {chosen[-1]})`"
        if steps < traj.steps:
            raise ValueError(
                f"{call}: the shortest sequence has {steps} steps, so that only lags 0 to {most} exist for all{why}; "
                "ask for fewer lags, or select longer sequences by `traj.take(index)`."
            )
        raise ValueError(
            f"{call}: a trajectory of T = {traj.steps} steps has lags 0 to {most}{why}; run at least "
            f"{chosen[-1] + traj.steps - most} steps or ask for fewer lags."
        )
    if (adjoint is None) == (kind == "adjoint"):
        need = "needs adjoint=, the gradient of the loss at `traj.last`" if adjoint is None else "takes no adjoint"
        raise ValueError(f"`retention_curve(kind={kind!r})` {need}.")
    if adjoint is not None:
        _check_adjoint(traj, adjoint, anchor)
    return chosen


def _check_adjoint(traj: Trajectory, adjoint: Any, anchor: str) -> None:
    if anchor != "end":
        raise ValueError(
            "`retention_curve(kind='adjoint', anchor='start')`: an adjoint belongs to the end; use anchor='end'."
        )
    last = jax.eval_shape(lambda: traj.last)
    structures: list[Any] = [jax.tree.structure(adjoint), jax.tree.structure(last)]
    if structures[0] != structures[1]:
        raise ValueError(
            f"`retention_curve(adjoint=<{type(adjoint).__name__}>)`: expected {type(last).__name__}{traj.fields}, "
            "as `jax.grad` of a loss at `traj.last` gives it."
        )
    for got, want in zip(jax.tree.leaves(adjoint), jax.tree.leaves(last), strict=True):
        if jnp.shape(got) != want.shape or not jnp.issubdtype(jnp.result_type(got), jnp.floating):
            raise ValueError(
                f"`retention_curve(adjoint=<{jnp.result_type(got)} {jnp.shape(got)}>)`: expected floating point "
                f"{want.shape}, the shape of `traj.last`."
            )
    check_finite("retention_curve(adjoint=...)", adjoint)


def _check_result(kind: str, logs: Array, without_gradient: Array | None) -> None:
    """Refuses NaN and +inf unless traced, and adjoints that are all zero; -inf is a valid result."""
    if isinstance(logs, jax.core.Tracer):
        return
    if without_gradient is not None and without_gradient.size and np.all(np.asarray(without_gradient)):
        raise ValueError(
            "`retention_curve(adjoint=...)`: the gradient at lag 0 is zero in every sequence; take the "
            "gradient of a loss that depends on `traj.last`."
        )
    if np.all(np.asarray(logs) < np.inf):
        return
    raise ValueError(
        f"`retention_curve(kind={kind!r})`: a single step Jacobian leaves the range of {logs.dtype}; use float64."
    )
