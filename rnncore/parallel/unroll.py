"""Runs a cell over a sequence by Newton's method: all steps at once, a few times, instead of one after the other."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rnncore._types import Array, PyTree
from rnncore.cells.base import Cell
from rnncore.parallel.call import Arrays, Options, Settings, prepare
from rnncore.parallel.forecast import forecast_of
from rnncore.parallel.newton import solution
from rnncore.parallel.sweep import Operands
from rnncore.recurrence import associative


class Solution(NamedTuple):
    """The result of `parallel.unroll`.

    Fields:
      carry: after the last step; NaN where the iteration did not converge, and so are outputs and carries.
      outputs: (*batch, T, H), or (T, *batch, H) with `time_major`.
      carries: the carry after every step.
      converged: booleans (*batch).
      iterations: (*batch) int32.
      residual: (*batch), the largest |f(s_{t-1}, x_t) - s_t| / max(1, |f(s_{t-1}, x_t)|).
    """

    carry: Any
    outputs: Array
    carries: Any
    converged: Array
    iterations: Array
    residual: Array


def unroll(
    cell: Cell,
    params: PyTree,
    xs: Array,
    *,
    initial_carry: Any = None,
    resets: Any = None,
    reset_carry: Any = None,
    time_major: bool = False,
    method: str = "newton",
    tolerance: float | None = None,
    max_iterations: int = 100,
    sweeps: int = 8,
    check: bool = True,
) -> Solution:
    """Runs a pointwise cell over time by solving for all states at once.

    s_t - f(s_{t-1}, x_t) = 0 for all t,   s' = s + u,   u_t = J_t u_{t-1} + f(s_{t-1}, x_t) - s_t

    An iteration is the run's product over all steps at once and a linear recurrence, in about log2(T) rounds; it has no
    loop over T.  Over `Diagonal()` the recurrence is elementwise, over `Heads(N)` one of (F H/N)^2 blocks.
    A cell whose state is linear in its past, such as `MinGRU`, is solved by that recurrence at once, without a guess.

    Args:
      cell: a `PointwiseCell` over Dense(), Heads(N) or Diagonal(), or a structure that runs as one of these.
      params: its parameters.
      xs: inputs (*batch, T, D), or (T, *batch, D) with `time_major`; float32 or float64.
      initial_carry: carry of (*batch, H) arrays; zeros by default.
      resets: booleans of the shape of xs without D: where True a step begins with `reset_carry`.
      reset_carry: the initial carry by default.
      method: "newton", with the whole Jacobian, T (F H)^2 numbers for a sequence; "quasi", with what each unit does to
        itself, T F^2 H, which converges more slowly, and whose derivative is a loop over T as that of `rnncore.unroll`.
        Both are the same over `Diagonal()`.
      tolerance: of the residual; 128 times the machine epsilon by default.
      max_iterations: how many at most.
      sweeps: evaluations of f for all t after every iteration.
      check: make a `forecast` first and reject runs that will not converge.  Inside jit, grad or vmap values are
        unknown, so no forecast is made.

    Returns:
      `Solution`.  Sequences that did not converge are NaN; see `converged`, `iterations` and `residual`.

    Raises:
      ValueError: invalid shapes, dtypes or options.
      NotImplementedError: a cell that has no elementwise coefficients; a run that the forecast says will not converge.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import parallel
      >>> cell = rnncore.LSTM(4)
      >>> params, xs = cell.init(jax.random.key(0), 3), jax.random.normal(jax.random.key(1), (2, 300, 3))
      >>> run = parallel.unroll(cell, params, xs)
      >>> bool(jnp.allclose(run.outputs, rnncore.unroll(cell, params, xs)[1], atol=1e-5)), int(run.iterations.max()) < 9
      (True, True)

    Source: Lim et al. (2024), DEER, arXiv:2309.12252; Gonzalez et al. (2024), quasi-DEER, arXiv:2407.19115.  The
    sweeps and the bounds on an update are this library's.
    """
    options = Options(initial_carry, resets, reset_carry, time_major, method, tolerance, max_iterations, sweeps)
    settings, arrays = prepare(cell, params, xs, options)
    if check and settings.linear is None and not any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves(arrays)):
        expected = forecast_of(settings, arrays)
        if not expected.converges:
            raise NotImplementedError(
                f"`parallel.unroll(<{type(cell).__name__}>, xs=<{arrays.xs.dtype} {jnp.shape(xs)}>)`: the forecast is "
                f"{expected}; expected at most half of max_iterations={max_iterations}. Use rnncore.unroll."
            )
    return run(settings, arrays)


@functools.partial(jax.jit, static_argnums=0)
def run(settings: Settings, arrays: Arrays) -> Solution:
    """The iteration, and the derivatives of its solution."""
    newton = settings.newton
    cell = newton.sweep.cell
    with jax.default_matmul_precision("highest"):
        zs = cell.project(arrays.params, arrays.xs)
        operands = Operands(arrays.params, zs, arrays.start, arrays.reset_carry)
        if settings.linear is None:
            found = newton.find(jax.lax.stop_gradient(operands), arrays.resets)
            states = solution(newton.sweep, operands, arrays.resets, jax.lax.stop_gradient(found.states))
        else:
            start, back = arrays.start, arrays.reset_carry
            states, _ = associative.states(cell, settings.linear, arrays.params, zs, start, back, arrays.resets)
            found = newton.check(*jax.lax.stop_gradient((operands, arrays.resets, states)))
    converged = found.residual <= newton.tolerance
    states = jax.tree.map(lambda a: jnp.where(converged[..., None], a, jnp.nan), states)
    last = jax.tree.map(lambda a: a[-1], states)
    outputs = cell.output(states)
    if not settings.time_major:
        batch = outputs.ndim - 2
        outputs, states = jax.tree.map(lambda a: jnp.moveaxis(a, 0, batch), (outputs, states))
    return Solution(last, outputs, states, converged, found.iterations[-1], found.residual)
