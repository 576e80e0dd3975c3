"""The bound on a step's Jacobian that is known before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rnncore._types import Array
from rnncore.analysis.scaled import log_operator_norm
from rnncore.analysis.trajectory import check_finite
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
"""Activations and the largest absolute slope that they have anywhere."""


def gradient_bound(cell: Cell, params: CellParams, *, slope: float | None = None) -> Array:
    """Bound on the operator norm of every step Jacobian of an Elman network, whatever its inputs.

    ||J_t||_2 <= beta_f beta_W,   beta_f = max |phi'|,   beta_W = ||U||_2   (||U + I||_2 with `residual`)

    Over k steps the gradient keeps at most (beta_f beta_W)^k.  Below 1 it must vanish; above 1 it may
    explode and need not.

    Args:
      cell: `Elman` or `IndRNN`.
      params: its parameters.
      slope: beta_f; None looks it up: 1 for tanh, relu and the identity, 1/4 for the sigmoid.

    Returns:
      The bound, a scalar.

    Raises:
      ValueError: an activation whose slope is not known here; parameters that are not finite.
      NotImplementedError: a gated cell, for which no such bound in the weights alone exists here.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import analysis
      >>> cell = rnncore.Elman(4, activation_fn=jax.nn.sigmoid)  # its initial U is orthogonal
      >>> round(float(analysis.gradient_bound(cell, cell.init(jax.random.key(0), 3))), 5)
      0.25

    Source: Pascanu, Mikolov and Bengio (2013), arXiv:1211.5063, section 2.1.
    """
    if not isinstance(cell, Elman) or type(cell).pointwise is not Elman.pointwise:
        raise NotImplementedError(
            f"`gradient_bound({type(cell).__name__})`: known for rnncore.Elman and rnncore.IndRNN; for other cells use "
            "`retention_curve(kind='bound')`, the product of the norms of the exact step Jacobians."
        )
    check_finite("gradient_bound(params=...)", params, "no bound follows from it")
    slope = _slope(cell.activation_fn) if slope is None else slope
    if not slope >= 0:
        raise ValueError(f"`gradient_bound(slope={slope})`: expected max |phi'|, at least 0.")
    matrix = cell.recurrence.gate_matrices(params.recurrent_kernel)[0]
    if cell.residual:
        matrix = matrix + jnp.eye(cell.hidden_size, dtype=matrix.dtype)
    return slope * jnp.exp(log_operator_norm(matrix))


def _slope(activation: Any) -> float:
    for known, slope in SLOPES:
        if activation is known:
            return slope
    name = getattr(activation, "__name__", repr(activation))
    raise ValueError(
        f"`gradient_bound` of a cell with activation_fn={name}: its largest slope is not known here; "
        "pass it as slope=..."
    )
