"""The cell state of an LSTM over many steps: the exact derivative, and two products often taken for it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rnncore._types import Array
from rnncore.analysis.jacobians.products import ScaledMatrix, jacobian_product
from rnncore.analysis.jacobians.steps import step_coefficients, step_jacobians
from rnncore.analysis.paths._lstm_state import output_slope
from rnncore.analysis.paths.gates import diagonal, row_scaled
from rnncore.analysis.paths.lstm import first_slope, lstm_paths, plain_lstm
from rnncore.analysis.run._alignment import check_anchor
from rnncore.analysis.run._shown import shown
from rnncore.analysis.run.trajectory import Trajectory
from rnncore.cells.lstm import LSTM


class CellProducts(NamedTuple):
    """Three matrices that are each called "the gradient through the cell state", for every lag k.

    Fields:
      direct: the product of diag(f_t), every h held fixed.
      one_step_total: the product of the one-step total derivatives A_t.
      state: d c_T / d c_{T-k}, the only one that is a derivative of the run.
    """

    direct: ScaledMatrix
    one_step_total: ScaledMatrix
    state: ScaledMatrix

    def __repr__(self) -> str:
        return shown(self)


def cell_products(traj: Trajectory, *, anchor: str = "end", h0_tied: Array | bool | None = None) -> CellProducts:
    """d c_T / d c_{T-k} of an LSTM, the product of its forget gates and that of its four-term sums.

    direct:          F_T F_{T-1} ... F_{T-k+1}
    one_step_total:  A_T A_{T-1} ... A_{T-k+1},   A_t = F_t + K_t Delta_{t-1},   K_t = B^f_t + B^i_t + B^g_t
    state:           [I 0] J_T J_{T-1} ... J_{T-k+1} [I; Delta_{T-k}]

    All three agree at lag 0, the last two at lag 1.  From lag 2 on c_{T-k} also acts through the output
    gates, which no A_t includes: see `two_step_residual`.

    Args:
      traj: a trajectory of T steps of an `LSTM`.
      anchor: "end", c_T in terms of c_{T-k}; "start", c_{s+k} in terms of c_s, with s = 1, or 0 with h0_tied.
      h0_tied: as in `lstm_paths`; None leaves c_0 out.

    Returns:
      `CellProducts` with matrices (*batch, S + 1, H, H), S = T - 1, or T with h0_tied; [..., k, :, :] is lag k.

    Raises:
      ValueError: as `lstm_paths` does; unknown anchor.
      NotImplementedError: as `lstm_paths` does; a trajectory with lengths.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import analysis
      >>> cell = rnncore.LSTM(4)
      >>> run = analysis.trajectory(cell, cell.init(jax.random.key(0), 3), jnp.ones((5, 3)))
      >>> products = analysis.cell_products(run)
      >>> products.state.matrix.shape
      (5, 4, 4)
      >>> wrong = jnp.abs(products.one_step_total.to_dense() - products.state.to_dense()).max((-2, -1))
      >>> (wrong > 1e-4).tolist()
      [False, False, True, True, True]
    """
    plain_lstm(traj, "cell_products(...)")
    if traj.lengths is not None:
        raise NotImplementedError(
            "`cell_products(...)` of a trajectory with seq_lengths: its sequences do not end together; select "
            "one by `traj.take(i)`."
        )
    check_anchor("cell_products", anchor)
    first_slope(traj, h0_tied, "cell_products", 1)
    paths, hidden = lstm_paths(traj, h0_tied=h0_tied), traj.cell.hidden_size
    whole = jacobian_product(step_jacobians(traj)[..., paths.first - 1 :, :, :], anchor)
    # The columns are the tangents at the start: c, with h moving along.
    slope = jnp.flip(paths.slope, -2) if anchor == "end" else paths.slope[..., :1, :]
    rows = whole.matrix[..., :hidden, :]
    exact = rows[..., :hidden] + rows[..., hidden:] * slope[..., None, :]
    return CellProducts(
        jacobian_product(diagonal(paths.forget_direct), anchor),
        jacobian_product(paths.one_step_total(), anchor),
        ScaledMatrix(exact, whole.log_scale),
    )


def two_step_residual(traj: Trajectory, *, h0_tied: Array | bool | None = None) -> Array:
    """The exact derivative over two steps of an LSTM minus the product of its two one-step totals.

    d c_{k+2} / d c_k - A_{k+2} A_{k+1} = K_{k+2} G_{k+1} Delta_k

    c_k reaches c_{k+2} through h_k, the output gate o_{k+1} and h_{k+1}, without passing c_{k+1}.

    Args:
      traj: a trajectory of T >= 3 steps of an `LSTM`.
      h0_tied: as in `lstm_paths`; None leaves k = 0 out.

    Returns:
      (*batch, S - 1, H, H), S = T - 1, or T with h0_tied; the first entry is k = 1, or 0 with h0_tied.

    Raises:
      ValueError, NotImplementedError: as `lstm_paths` does; fewer than two steps after the first c.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import analysis
      >>> cell = rnncore.LSTM(4)
      >>> run = analysis.trajectory(cell, cell.init(jax.random.key(0), 3), jnp.ones((5, 3)))
      >>> products = analysis.cell_products(run)
      >>> lacking = products.state.to_dense()[2] - products.one_step_total.to_dense()[2]
      >>> bool(jnp.allclose(lacking, analysis.two_step_residual(run)[-1], atol=1e-6))
      True
    """
    plain_lstm(traj, "two_step_residual(...)")
    slope = first_slope(traj, h0_tied, "two_step_residual", 2)
    return _residual(traj, slope)


@jax.jit
def _residual(traj: Trajectory, slope: Any) -> Array:
    cell = traj.cell
    assert isinstance(cell, LSTM)
    coefficients, slopes = step_coefficients(traj).recurrent, output_slope(traj)
    u_i, u_f, u_g, u_o = cell.recurrence.gate_matrices(traj.params.recurrent_kernel)
    if slope is not None:
        slopes = jnp.concatenate([slope[..., None, :], slopes], -2)
    count = slopes.shape[-2] - 2  # of pairs of steps after the first c
    into = coefficients.c
    k = row_scaled(into.i, u_i) + row_scaled(into.f, u_f) + row_scaled(into.g, u_g)
    g = row_scaled(coefficients.h.o, u_o)
    later, middle = k[..., -count:, :, :], g[..., -count - 1 : -1, :, :]
    return jnp.matmul(later, middle, precision="highest") * slopes[..., :count, None, :]
