"""What carries the cell state of an LSTM over one step, gate by gate, and over many, rightly and wrongly."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from rnncore._types import Array
from rnncore.analysis.jacobians.steps import step_coefficients
from rnncore.analysis.paths._lstm_state import lstm_of, output_slope
from rnncore.analysis.paths.gates import Paths, diagonal, row_scaled
from rnncore.analysis.run._shown import shown
from rnncore.analysis.run.trajectory import Trajectory, check_finite
from rnncore.cells.lstm import LSTM


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("forget_direct", "via_forget", "via_input", "via_candidate", "via_output", "slope"),
    meta_fields=("first", "padded"),
)
@dataclasses.dataclass(frozen=True, repr=False)
class LSTMPaths(Paths):
    """The one-step total derivative d c_t / d c_{t-1} of an LSTM by path, for t = first .. T, S steps.

    Fields:
      forget_direct: (*batch, S, H), the diagonal F_t = f_t.
      via_forget, via_input, via_candidate: (*batch, S, H, H), through h_{t-1} into that gate.
      via_output: (*batch, S, H, H), G_t = d h_t / d h_{t-1} with c_t held fixed.  It is not part of the sum: it
        bypasses c_t, which only the state Jacobian shows.
      slope: (*batch, S + 1, H), the diagonals Delta_t = d h_t / d c_t for t = first - 1 .. T.
      first: the step of the first entry, 1 or 2.
      padded: whether the run has lengths.
    """

    forget_direct: Array
    via_forget: Array
    via_input: Array
    via_candidate: Array
    via_output: Array
    slope: Array
    first: int
    padded: bool = False

    def __repr__(self) -> str:
        return shown(self)

    def terms(self) -> dict[str, Array]:
        """The four that add up to d c_t / d c_{t-1}."""
        return {
            "forget_direct": diagonal(self.forget_direct),
            "via_forget": self.via_forget,
            "via_input": self.via_input,
            "via_candidate": self.via_candidate,
        }

    def one_step_total(self) -> Array:
        """A_t = d c_t / d c_{t-1} with h_{t-1} moving along, (*batch, S, H, H).

        Exact for one step.  A product of them is not d c_T / d c_k: see `cell_products`.
        """
        return self.total()

    def cotangents(self, adjoint: Any) -> Array:
        """dL/dc_t with h_t moving along, for t = first .. T."""
        c, h = (getattr(adjoint, name)[..., self.first :, :] for name in ("c", "h"))
        return c + self.slope[..., 1:, :] * h


def lstm_paths(traj: Trajectory, *, h0_tied: Array | bool | None = None) -> LSTMPaths:
    """The four paths of d c_t / d c_{t-1} of an LSTM, and the one that bypasses it.

    d c_t / d c_{t-1} = F_t + (B^f_t + B^i_t + B^g_t) Delta_{t-1}
    F_t = diag(f_t),  B^f_t = diag(c_{t-1} f_t (1 - f_t)) U_f,  B^i_t = diag(g_t i_t (1 - i_t)) U_i,
    B^g_t = diag(i_t (1 - g_t^2)) U_g,  Delta_t = diag(o_t (1 - tanh^2 c_t)),
    G_t = diag(tanh(c_t) o_t (1 - o_t)) U_o

    This is the total derivative of one step, h_{t-1} = o_{t-1} tanh(c_{t-1}) at a fixed o_{t-1}.

    Args:
      traj: a trajectory of T steps of an `LSTM`; other gate functions are differentiated as they are.
      h0_tied: how h_0 moves with c_0, which the run does not determine.  None: not known, and the paths start at
        t = 2.  False: not at all.  An array (*batch, H): d h_0 / d c_0, if a step before produced both.

    Returns:
      `LSTMPaths`.

    Raises:
      ValueError: the cell has no cell state; h0_tied of another shape; a single step without h0_tied.
      NotImplementedError: peepholes, the coupled gate, and cells other than `LSTM`.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import analysis
      >>> cell = rnncore.LSTM(4)
      >>> run = analysis.trajectory(cell, cell.init(jax.random.key(0), 3), jnp.ones((2, 5, 3)))
      >>> paths = analysis.lstm_paths(run)
      >>> paths.first, paths.one_step_total().shape
      (2, (2, 4, 4, 4))

    Source: Hochreiter and Schmidhuber (1997) for F_t alone.  The four-term sum is often multiplied over
    steps; that product is not d c_T / d c_k, see `cell_products`.
    """
    plain_lstm(traj, "lstm_paths(...)")
    slope = first_slope(traj, h0_tied, "lstm_paths", 1)
    return _lstm_paths(traj, slope)


def plain_lstm(traj: Trajectory, call: str) -> None:
    """An error unless the closed forms of an LSTM hold for the cell of a trajectory."""
    advice = "use `gate_paths(traj)`, which splits the steps of every pointwise cell"
    cell = lstm_of(traj, call, advice)
    if cell.peepholes or cell.coupled:
        what = "peepholes, through which c enters the gates" if cell.peepholes else "a coupled gate, so no input gate"
        raise NotImplementedError(f"`{call}`: this LSTM has {what}, for which the four paths do not hold; {advice}.")


def first_slope(traj: Trajectory, h0_tied: Any, call: str, least: int) -> Array | None:
    """Delta_0 as an array (*batch, H), or None where it is not known; checks that `least` steps remain."""
    shape = (*traj.batch_shape, traj.cell.hidden_size)
    if h0_tied is None:
        if traj.steps - 1 < least:
            raise ValueError(
                f"`{call}(h0_tied=None)`: the paths start at t = 2, the trajectory has T = {traj.steps}; run at least "
                f"{least + 1} steps, or pass h0_tied= for how h_0 moves with c_0 (False: not at all)."
            )
        return None
    if traj.steps < least:
        raise ValueError(f"`{call}(...)`: the trajectory has T = {traj.steps}; run at least {least} steps.")
    dtype = traj.carries.c.dtype
    if h0_tied is False:
        return jnp.zeros(shape, dtype)
    if jnp.shape(h0_tied) != shape or not jnp.issubdtype(jnp.result_type(h0_tied), jnp.floating):
        raise ValueError(
            f"`{call}(h0_tied=<{jnp.result_type(h0_tied)} {jnp.shape(h0_tied)}>)`: expected None, False, or "
            f"d h_0 / d c_0 as a floating-point array {shape}."
        )
    check_finite(f"{call}(h0_tied=...)", h0_tied)
    return jnp.asarray(h0_tied, dtype)


@jax.jit
def _lstm_paths(traj: Trajectory, slope: Array | None) -> LSTMPaths:
    cell, skip = traj.cell, int(slope is None)
    assert isinstance(cell, LSTM)
    coefficients = step_coefficients(traj)
    matrices = dict(zip(cell.gates, cell.recurrence.gate_matrices(traj.params.recurrent_kernel), strict=True))
    slopes = output_slope(traj)
    if slope is not None:
        slopes = jnp.concatenate([slope[..., None, :], slopes], -2)

    def into(gate: str) -> Array:
        matrix = row_scaled(getattr(coefficients.recurrent.c, gate)[..., skip:, :], matrices[gate])
        return matrix * slopes[..., :-1, None, :]

    return LSTMPaths(
        forget_direct=coefficients.state.c.c[..., skip:, :],
        via_forget=into("f"),
        via_input=into("i"),
        via_candidate=into("g"),
        via_output=row_scaled(coefficients.recurrent.h.o[..., skip:, :], matrices["o"]),
        slope=slopes,
        first=1 + skip,
        padded=traj.lengths is not None,
    )
