"""Predicts the iterations of a run from a pilot run over its first steps and the growth of errors in it."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rnncore._types import Array, PyTree
from rnncore.cells.base import Cell
from rnncore.cells.blocks import blocks_of
from rnncore.parallel.call import Arrays, Options, Settings, prepare
from rnncore.parallel.growth import transient_growth
from rnncore.parallel.newton import Newton
from rnncore.parallel.sweep import Operands

SHORTEST, LONGEST = 256, 1024  # steps of a pilot
GROWTH_OVER = 128  # steps whose Jacobians are multiplied
MOST_NUMBERS = 2**26  # of these Jacobians


class Forecast(NamedTuple):
    """What `parallel.forecast` expects of a run.

    Fields:
      iterations: how many it will take; with about as many as steps there is no gain.
      converges: whether that is at most half of `max_iterations`.
      growth: the largest sum_j |J_t ... J_{j+1}| over the first steps, how much a unit error at every step adds up to;
        nan where the pilot did not converge.
      exponent: the mean rate at which a product of step Jacobians grows, an estimate of the leading Lyapunov exponent.
      pilot_steps, pilot_iterations: of the pilot.
    """

    iterations: float
    converges: bool
    growth: float
    exponent: float
    pilot_steps: int
    pilot_iterations: int

    def __str__(self) -> str:
        return (
            f"about {self.iterations:.0f} iterations; the first {self.pilot_steps} steps took {self.pilot_iterations}, "
            f"where errors add up to {self.growth:.3g} times their size (leading exponent {self.exponent:+.3f})"
        )


def forecast(cell: Cell, params: PyTree, xs: Array, **options: Any) -> Forecast:
    """How many iterations `parallel.unroll` will take, from its first 256 to 1024 steps.

    k(T) = k(W) (T / W)^p,   p = log(k(W) / k(W/4)) / log 4, held within 0 and 1, for a pilot of W steps

    Args:
      cell, params, xs, options: as of `parallel.unroll`, of numbers that are known.

    Returns:
      `Forecast`, which prints as a sentence.

    Raises:
      As `parallel.unroll` does for its arguments.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import parallel
      >>> cell = rnncore.Elman(16)
      >>> params, xs = cell.init(jax.random.key(0), 3), jax.random.normal(jax.random.key(1), (500, 3))
      >>> calm = params._replace(recurrent_kernel=0.5 * params.recurrent_kernel)
      >>> wild = params._replace(recurrent_kernel=4 * params.recurrent_kernel)
      >>> parallel.forecast(cell, calm, xs).converges, parallel.forecast(cell, wild, xs, max_iterations=50).converges
      (True, False)
    """
    return forecast_of(*prepare(cell, params, xs, Options(**options)))


def forecast_of(settings: Settings, arrays: Arrays) -> Forecast:
    """The forecast of a call that has been checked.

    A run is a prefix of a longer one, and so are its iterations k(w).  A stable cell's grow as the largest error of w
    steps does, slowly; where information about the past is kept they grow as w.  Between the last quarter of the
    pilot and the end of the run they are taken to follow one power of w.
    """
    steps = arrays.xs.shape[0]
    pilot = min(steps, max(SHORTEST, min(steps // 4, LONGEST)))
    resets = None if arrays.resets is None else arrays.resets[:pilot]
    limit = settings.newton.max_iterations
    newton = dataclasses.replace(settings.newton, max_iterations=max(limit, pilot // 4))
    iterations, growth, exponent = _pilot(newton, arrays._replace(xs=arrays.xs[:pilot], resets=resets))
    early, late = int(iterations[pilot // 4 - 1] if pilot >= 4 else iterations[-1]), int(iterations[-1])
    power = min(max(math.log(max(late, 1) / max(early, 1)) / math.log(4), 0.0), 1.0)
    expected = late * (steps / pilot) ** power
    converges = bool(jnp.isfinite(growth)) and expected <= limit / 2
    return Forecast(expected, converges, float(growth), float(exponent), pilot, late)


@functools.partial(jax.jit, static_argnums=0)
def _pilot(newton: Newton, arrays: Arrays) -> tuple[Array, Array, Array]:
    """(the most iterations of any sequence up to every step, growth, exponent)."""
    cell = newton.sweep.cell
    exact = dataclasses.replace(newton.sweep, own=False)
    with jax.default_matmul_precision("highest"):
        zs = cell.project(arrays.params, arrays.xs)
        operands = Operands(arrays.params, zs, arrays.start, arrays.reset_carry)
        found = newton.find(operands, arrays.resets)

        blocks, fields = blocks_of(cell.recurrence, cell.hidden_size), len(arrays.start)
        a_step = arrays.start.h.size * blocks.size * fields**2
        most = max(2, min(GROWTH_OVER, MOST_NUMBERS // a_step))
        few, resets, states = jax.tree.map(lambda a: a[:most], (zs, arrays.resets, found.states))
        operands = operands._replace(zs=few)
        parts = exact.after(operands, exact.before(operands, resets, states))[1]
        sums, log = transient_growth(exact.jacobian(arrays.params, parts, resets))
    converged = jnp.max(found.residual) <= newton.tolerance
    iterations = jnp.max(found.iterations.reshape(found.iterations.shape[0], -1), 1)
    steps = sums.shape[0]
    return iterations, jnp.where(converged, jnp.max(sums), jnp.nan), jnp.max(log) / steps
