"""The cell state of an LSTM: how h_t depends on c_t, and the path through the forget gates alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rnncore._types import Array
from rnncore.analysis.run._alignment import check_anchor, ending_together, mask_missing
from rnncore.analysis.run.trajectory import Trajectory, check_trajectory
from rnncore.cells.lstm import LSTM


def lstm_of(traj: Trajectory, call: str, advice: str = "use path='state'") -> LSTM:
    """The cell of a trajectory if it is an LSTM, else an error with advice."""
    check_trajectory(call, traj)
    cell, name = traj.cell, type(traj.cell).__name__
    if "c" not in traj.fields:
        raise ValueError(f"`{call}`: {name} carries {', '.join(traj.fields)} and has no cell state c; {advice}.")
    if not isinstance(cell, LSTM) or type(cell).pointwise is not LSTM.pointwise:
        raise NotImplementedError(f"`{call}`: how h depends on c is known for rnncore.LSTM, not for {name}; {advice}.")
    return cell


def output_slope(traj: Trajectory) -> Array:
    """Delta_t = d h_t / d c_t at fixed pre-activation of the output gate, for t = 1 .. T.

    o_t (1 - tanh^2 c_t); with peepholes the derivative of the output gate with respect to c_t is included.

    Returns:
      (*batch, T, H), the diagonal.
    """
    cell = traj.cell
    assert isinstance(cell, LSTM)
    before, c = traj.before.h, traj.carries.c[..., 1:, :]
    with jax.default_matmul_precision("highest"):
        r = cell.split(cell.recurrent_matmul(traj.params, before)).o
    a = cell.split(traj.zs).o + r

    def h(c: Array) -> Array:
        o = cell.gate_fn(a + jnp.broadcast_to(traj.params.units.o, c.shape) * c if cell.peepholes else a)
        return o * cell.activation_fn(c)

    return jax.jvp(h, (c,), (jnp.ones_like(c),))[1]


def direct_retention(traj: Trajectory, anchor: str = "end") -> Array:
    """ln of the product of forget gates, for each unit: the path through the cell state alone.

    anchor "end":   f_T f_{T-1} ... f_{T-k+1}
    anchor "start": f_k f_{k-1} ... f_1

    This is d c_T / d c_{T-k} with h held fixed at every step, not the derivative: see `retention_curve`.
    Peepholes, which depend on c too, are left out.

    Args:
      traj: a trajectory of T steps of an LSTM.
      anchor: which end is fixed.

    Returns:
      (*batch, T + 1, H); [..., k, :] is lag k.  -inf where a gate is exactly 0, and across a reset; +inf at lags
      above the length of a sequence.

    Raises:
      ValueError: the cell has no cell state; unknown anchor.
      NotImplementedError: the cell has one but is not an LSTM.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import analysis
      >>> cell = rnncore.LSTM(4)
      >>> params = jax.tree.map(jnp.zeros_like, cell.init(jax.random.key(0), 3))
      >>> run = analysis.trajectory(cell, params, jnp.ones((5, 3)))
      >>> jnp.exp(analysis.direct_retention(run)[:, 0]).round(5).tolist()
      [1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125]

    Source: the constant error carousel of Hochreiter and Schmidhuber (1997), with the forget gate of
    Gers, Schmidhuber and Cummins (2000).
    """
    lstm_of(traj, "direct_retention(...)")
    check_anchor("direct_retention", anchor)
    logs = forget_logs(ending_together(traj) if anchor == "end" else traj, anchor)
    logs = jnp.concatenate([jnp.zeros_like(logs[..., :1, :]), jnp.cumsum(logs, -2)], -2)
    return jnp.moveaxis(mask_missing(traj, jnp.arange(traj.steps + 1), jnp.moveaxis(logs, -1, 0)), 0, -1)


def forget_logs(traj: Trajectory, anchor: str) -> Array:
    """ln of the forget gate of every step, (*batch, T, H), from the anchor on; -inf at a reset."""
    logs = jnp.log(jnp.abs(traj.gates.f))
    if traj.resets is not None:
        logs = jnp.where(traj.resets[..., None], -jnp.inf, logs)
    return jnp.flip(logs, -2) if anchor == "end" else logs
