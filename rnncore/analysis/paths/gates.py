"""Step Jacobians split by path: directly, or through h into one of the gates."""

from __future__ import annotations

import abc
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from rnncore._types import Array
from rnncore.analysis.jacobians.steps import step_coefficients
from rnncore.analysis.run._shown import shown
from rnncore.analysis.run.flat import flatten_carry
from rnncore.analysis.run.trajectory import Trajectory, check_trajectory, trailing
from rnncore.cells.base import PointwiseCell
from rnncore.cells.gru_reset_before import ResetBeforeGRU


class Paths(abc.ABC):
    """Matrices for single steps that add up to a one-step derivative.

    At a reset all are 0; in the padding the direct path is the identity and the others are 0.

    Attributes:
      padded: whether the run has lengths, so that some of the last steps may be padding.
    """

    padded: bool

    @abc.abstractmethod
    def terms(self) -> dict[str, Array]:
        """The paths by name, as matrices (*batch, S, n, n)."""

    @abc.abstractmethod
    def cotangents(self, adjoint: Any) -> Array:
        """Gradients (*batch, S, n) at what the rows stand for, from those at T + 1 carries."""

    def total(self) -> Array:
        """The sum of the paths, (*batch, S, n, n)."""
        return functools.reduce(jnp.add, self.terms().values())


@functools.partial(jax.tree_util.register_dataclass, data_fields=("direct", "gates"), meta_fields=("padded",))
@dataclasses.dataclass(frozen=True, repr=False)
class GatePaths(Paths):
    """The Jacobian of the whole state, n entries, by gate; the sum is exactly J_t.

    Fields:
      direct: (*batch, T, n, n), from s_{t-1} to s_t without a recurrent weight.
      gates: named tuple by gate of (*batch, T, n, n), through h_{t-1} and U_g into that gate.
      padded: whether the run has lengths.
    """

    direct: Array
    gates: Any
    padded: bool = False

    def __repr__(self) -> str:
        return shown(self)

    def terms(self) -> dict[str, Array]:
        """ "direct", and "via_<gate>" for every gate."""
        return {"direct": self.direct} | {f"via_{name}": a for name, a in self.gates._asdict().items()}

    def cotangents(self, adjoint: Any) -> Array:
        """dL/ds_t for t = 1 .. T."""
        return flatten_carry(adjoint, self.direct.ndim - 2)[..., 1:, :]


def gate_paths(traj: Trajectory) -> GatePaths:
    """Splits every step Jacobian of a cell into a direct path and one path for each gate.

    d s_t / d s_{t-1} = direct + sum_g diag(d s_t / d r_g) U_g,   r_g = U_g h_{t-1}
    GRU:              direct = diag(z),   z: diag((h_{t-1} - n) z (1 - z)) U_z
      reset after:    n: diag((1 - z) (1 - n^2) r) U_n,
                      r: diag((1 - z) (1 - n^2) (U_n h_{t-1} + b_hn) r (1 - r)) U_r
      reset before:   n: diag((1 - z) (1 - n^2)) U_n diag(r),
                      r: diag((1 - z) (1 - n^2)) U_n diag(h_{t-1} r (1 - r)) U_r

    Args:
      traj: a trajectory of T steps of any pointwise cell, your own included, or of a `ResetBeforeGRU`.

    Returns:
      `GatePaths`; `.total()` is `step_jacobians(traj)`.

    Raises:
      NotImplementedError: another cell.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import analysis
      >>> cell = rnncore.MGU(4)
      >>> run = analysis.trajectory(cell, cell.init(jax.random.key(0), 3), jnp.ones((2, 5, 3)))
      >>> paths = analysis.gate_paths(run)
      >>> list(paths.terms()), paths.gates.f.shape
      (['direct', 'via_f', 'via_n'], (2, 5, 4, 4))

    Source: for GRUs Cho et al. (2014), arXiv:1406.1078, v3 for the reset after the product, v1 for the reset before.
    """
    check_trajectory("gate_paths", traj)
    if isinstance(traj.cell, ResetBeforeGRU) and type(traj.cell).update is ResetBeforeGRU.update:
        return _reset_before(traj)
    if not isinstance(traj.cell, PointwiseCell):
        raise NotImplementedError(
            f"`gate_paths(...)`: {type(traj.cell).__name__} is not a PointwiseCell, so what enters each "
            "gate is not known; use `step_jacobians(traj)`."
        )
    return _gate_paths(traj)


def diagonal(a: Array) -> Array:
    """(..., n) as diagonal matrices (..., n, n)."""
    return row_scaled(a, jnp.eye(a.shape[-1], dtype=a.dtype))


def row_scaled(a: Array, matrix: Array) -> Array:
    """diag(a) M (..., m, n) of a (..., m) and one matrix (m, n)."""
    return a[..., None] * jnp.broadcast_to(matrix, (*a.shape, matrix.shape[-1]))


@jax.jit
def _gate_paths(traj: Trajectory) -> GatePaths:
    cell, fields = traj.cell, traj.fields
    assert isinstance(cell, PointwiseCell)
    coefficients = step_coefficients(traj)
    matrices = cell.recurrence.gate_matrices(traj.params.recurrent_kernel)
    blank = jnp.zeros_like(matrices[0])

    def rows(blocks: Any) -> Array:
        """One block of rows for each field that comes out."""
        return jnp.concatenate([blocks(to) for to in fields], -2)

    def direct(to: str) -> Array:
        return jnp.concatenate([diagonal(a) for a in getattr(coefficients.state, to)], -1)

    def through(gate: str, matrix: Array) -> Array:
        wide = jnp.concatenate([matrix if name == "h" else blank for name in fields], -1)
        return rows(lambda to: row_scaled(getattr(getattr(coefficients.recurrent, to), gate), wide))

    return GatePaths(rows(direct), cell.Gates(*map(through, cell.gates, matrices)), traj.lengths is not None)


@jax.jit
def _reset_before(traj: Trajectory) -> GatePaths:
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
    parts = [z, reset, ((h - n) * z_slope)[..., None] * u_z, candidate * r[..., None, :]]
    for mask, stays in ((traj.resets, 0.0), (traj.padding, 1.0)):
        if mask is not None:
            parts = [jnp.where(trailing(mask, a), 0.0 if i else stays, a) for i, a in enumerate(parts)]
    return GatePaths(diagonal(parts[0]), type(traj.gates)(*parts[1:]), traj.lengths is not None)
