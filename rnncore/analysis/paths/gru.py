"""The four ways of the gradient through one step of a GRU, of either form."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from rnncore._types import Array
from rnncore.analysis.paths.gates import Paths, diagonal, gate_paths
from rnncore.analysis.run.trajectory import Trajectory, trailing
from rnncore.cells.gru import GRU
from rnncore.cells.gru_reset_before import ResetBeforeGRU


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("update_direct", "via_update", "via_candidate", "via_reset"),
    meta_fields=("padded",),
)
@dataclasses.dataclass(frozen=True)
class GRUPaths(Paths):
    """d h_t / d h_{t-1} of a GRU by path; the sum is exactly J_t, and products of sums are exact too.

    Fields:
      update_direct: (*batch, T, H), the diagonal of z_t.
      via_update, via_candidate, via_reset: (*batch, T, H, H), through h_{t-1} into that gate.
      padded: whether the run has lengths.
    """

    update_direct: Array
    via_update: Array
    via_candidate: Array
    via_reset: Array
    padded: bool = False

    def terms(self) -> dict[str, Array]:
        """The four by name."""
        return {
            "update_direct": diagonal(self.update_direct),
            "via_update": self.via_update,
            "via_candidate": self.via_candidate,
            "via_reset": self.via_reset,
        }

    def cotangents(self, adjoint: Any) -> Array:
        """dL/dh_t for t = 1 .. T."""
        return adjoint.h[..., 1:, :]


def gru_paths(traj: Trajectory) -> GRUPaths:
    """The four paths of d h_t / d h_{t-1} of a GRU.

    J_t = diag(z) + diag((h_{t-1} - n) z (1 - z)) U_z + candidate + reset
    reset after:   candidate = diag((1 - z) (1 - n^2) r) U_n
                   reset = diag((1 - z) (1 - n^2) (U_n h_{t-1} + b_hn) r (1 - r)) U_r
    reset before:  candidate = diag((1 - z) (1 - n^2)) U_n diag(r)
                   reset = diag((1 - z) (1 - n^2)) U_n diag(h_{t-1} r (1 - r)) U_r

    Args:
      traj: a trajectory of T steps of a `GRU` (reset after) or a `ResetBeforeGRU`; other gate functions
        are differentiated as they are.

    Returns:
      `GRUPaths`; `.total()` is `step_jacobians(traj)`.

    Raises:
      NotImplementedError: another cell.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import analysis
      >>> cell = rnncore.GRU(4)
      >>> run = analysis.trajectory(cell, cell.init(jax.random.key(0), 3), jnp.ones((2, 5, 3)))
      >>> bool(jnp.allclose(analysis.gru_paths(run).update_direct, run.gates.z))
      True

    Source: Cho et al. (2014), arXiv:1406.1078, v3 for the reset after the product and v1 for that before.
    """
    cell = traj.cell
    if isinstance(cell, GRU) and type(cell).pointwise is GRU.pointwise:
        paths = gate_paths(traj)
        update = jnp.diagonal(paths.direct, axis1=-2, axis2=-1)
        return GRUPaths(update, paths.gates.z, paths.gates.n, paths.gates.r, paths.padded)
    if isinstance(cell, ResetBeforeGRU) and type(cell).update is ResetBeforeGRU.update:
        return _reset_before_paths(traj)
    raise NotImplementedError(
        f"`gru_paths(...)`: known for rnncore.GRU and rnncore.ResetBeforeGRU, not for {type(cell).__name__}; "
        "use `gate_paths(traj)`, which takes every pointwise cell apart."
    )


@jax.jit
def _reset_before_paths(traj: Trajectory) -> GRUPaths:
    cell, h = traj.cell, traj.before.h
    assert isinstance(cell, ResetBeforeGRU)
    u_r, u_z, u_n = jnp.transpose(traj.params.recurrent_kernel, (1, 2, 0))
    z_r, z_z, z_n = jnp.split(traj.zs, 3, -1)

    def with_slope(fn: Any, a: Array) -> tuple[Array, Array]:
        return jax.jvp(fn, (a,), (jnp.ones_like(a),))

    with jax.default_matmul_precision("highest"):
        r, r_slope = with_slope(cell.gate_fn, z_r + h @ u_r.T)
        z, z_slope = with_slope(cell.gate_fn, z_z + h @ u_z.T)
        n, n_slope = with_slope(cell.activation_fn, z_n + (r * h) @ u_n.T)
        candidate = ((1 - z) * n_slope)[..., None] * u_n
        reset = (candidate * (h * r_slope)[..., None, :]) @ u_r
    update = ((h - n) * z_slope)[..., None] * u_z
    paths = GRUPaths(z, update, candidate * r[..., None, :], reset, traj.lengths is not None)
    for mask, stays in ((traj.resets, 0.0), (traj.padding, 1.0)):
        if mask is not None:
            paths = jax.tree.map(lambda a, mask=mask: jnp.where(trailing(mask, a), 0.0, a), paths)
            kept = jnp.where(trailing(mask, z), stays, paths.update_direct)
            paths = dataclasses.replace(paths, update_direct=kept)
    return paths
