"""Bounds on the Jacobian of a step from the weights alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rnncore._types import Array
from rnncore.analysis.jacobians.products import log_operator_norm
from rnncore.analysis.run.trajectory import check_finite
from rnncore.cells.base import Cell, CellParams
from rnncore.cells.elman import Elman

SLOPES: tuple[tuple[Callable, float], ...] = (
    (jnp.tanh, 1.0),
    (jax.lax.tanh, 1.0),
    (jax.nn.sigmoid, 0.25),
    (jax.lax.logistic, 0.25),
    (jax.nn.relu, 1.0),
    (jax.nn.identity, 1.0),
)
"""Activations and their largest absolute slopes."""


def gradient_bound(cell: Cell, params: CellParams, *, slope: float | None = None) -> Array:
    """Bound on the operator norm of every step Jacobian of an Elman network, whatever its inputs.

    ||J_t||_2 <= beta_f beta_W,   beta_f = max |phi'|,   beta_W = ||U||_2   (||U + I||_2 with `residual`)

    Over k steps at most (beta_f beta_W)^k of the gradient is left.  Below 1 it must vanish; above 1 it may
    explode.

    Args:
      cell: `Elman` or `IndRNN`.
      params: its parameters.
      slope: beta_f; by default 1 for tanh, relu and the identity, 1/4 for the sigmoid.

    Returns:
      The bound, a scalar.

    Raises:
      ValueError: an activation of unknown slope; parameters that are not finite.
      NotImplementedError: a gated cell, for which there is no such bound here.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import analysis
      >>> cell = rnncore.Elman(4, activation_fn=jax.nn.sigmoid)  # its initial U is orthogonal
      >>> round(float(analysis.gradient_bound(cell, cell.init(jax.random.key(0), 3))), 5)
      0.25

    Source: Pascanu, Mikolov and Bengio (2013), arXiv:1211.5063, section 2.1.
    """
    slope, matrix = _slope_and_matrix("gradient_bound", cell, params, slope)
    return slope * jnp.exp(log_operator_norm(matrix))


class VanishingCondition(NamedTuple):
    """The condition of Pascanu, Mikolov and Bengio for an Elman network.

    Fields:
      slope: gamma, the largest |phi'|.
      threshold: 1 / gamma.
      spectral_radius: of U (of U + I with `residual`), the largest |eigenvalue|.
      largest_singular_value: of the same matrix.
      vanishing_guaranteed: the gradient decays exponentially whatever the inputs: the largest singular value is
        below the threshold; for the identity as phi, where all steps have the same Jacobian, the spectral radius.
      explosion_possible: the same number is above the threshold, which is necessary for explosion, not sufficient.
    """

    slope: float
    threshold: float
    spectral_radius: float
    largest_singular_value: float
    vanishing_guaranteed: bool
    explosion_possible: bool


def vanishing_condition(cell: Cell, params: CellParams, *, slope: float | None = None) -> VanishingCondition:
    """Whether the gradient of an Elman network must vanish and whether it can explode, from its weights.

    J_t = diag(phi'(a_t)) U,   ||J_t|| <= gamma sigma_max(U),   gamma = max |phi'|
    sigma_max < 1 / gamma: must vanish;   sigma_max > 1 / gamma: may explode

    If phi is the identity, J_t = U exactly, and the spectral radius takes the place of sigma_max; norms may
    still grow for many steps at first.  Exactly at the threshold neither is claimed.

    Args:
      cell: `Elman` or `IndRNN`.
      params: its parameters, not traced, since the answers are plain numbers.
      slope: gamma; by default as in `gradient_bound`.

    Returns:
      `VanishingCondition`.

    Raises:
      ValueError: an activation of unknown slope; parameters that are not finite, or traced.
      NotImplementedError: a gated cell, for which there is no such condition here.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import analysis
      >>> cell = rnncore.Elman(4, activation_fn=jax.nn.sigmoid)  # its initial U is orthogonal
      >>> said = analysis.vanishing_condition(cell, cell.init(jax.random.key(0), 3))
      >>> said.threshold, round(said.spectral_radius, 3), said.vanishing_guaranteed, said.explosion_possible
      (4.0, 1.0, True, False)

    Source: Pascanu, Mikolov and Bengio (2013), arXiv:1211.5063, section 2.1, whose lambda_1 is a singular
    value in the nonlinear case.  For gradients with respect to h after phi the matrix is transposed and the
    factors are swapped, which changes neither number.
    """
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(params)):
        raise ValueError(
            "`vanishing_condition(params=<traced>)`: expected arrays with values; call it outside jit and grad, or use "
            "`gradient_bound`."
        )
    slope, traced = _slope_and_matrix("vanishing_condition", cell, params, slope)
    assert isinstance(cell, Elman)
    matrix = np.asarray(traced)
    radius = float(np.abs(np.linalg.eigvals(matrix)).max())
    largest = float(np.linalg.norm(matrix, 2))
    ruling = radius if cell.activation_fn is jax.nn.identity else largest
    return VanishingCondition(
        slope=slope,
        threshold=1 / slope if slope else math.inf,
        spectral_radius=radius,
        largest_singular_value=largest,
        vanishing_guaranteed=slope * ruling < 1,
        explosion_possible=slope * ruling > 1,
    )


def _slope_and_matrix(call: str, cell: Cell, params: CellParams, slope: float | None) -> tuple[float, Array]:
    """max |phi'| and the matrix that multiplies h, for a cell that has these."""
    if not isinstance(cell, Elman) or type(cell).pointwise is not Elman.pointwise:
        raise NotImplementedError(
            f"`{call}({type(cell).__name__})`: expected rnncore.Elman or rnncore.IndRNN; for other cells use "
            "`retention_curve(kind='bound')`, the product of the norms of the exact step Jacobians."
        )
    check_finite(f"{call}(params=...)", params)
    slope = _slope(call, cell.activation_fn) if slope is None else slope
    if not 0 <= slope < math.inf:
        raise ValueError(f"`{call}(slope={slope})`: expected max |phi'|, at least 0.")
    matrix = cell.recurrence.gate_matrices(params.recurrent_kernel)[0]
    return slope, matrix + jnp.eye(cell.hidden_size, dtype=matrix.dtype) if cell.residual else matrix


def _slope(call: str, activation: Any) -> float:
    for known, slope in SLOPES:
        if activation is known:
            return slope
    name = getattr(activation, "__name__", repr(activation))
    raise ValueError(f"`{call}` of a cell with activation_fn={name}: unknown largest slope; pass it as slope=...")
