"""Gradients over time: of states, inputs, gates and parameters at every step, from one backward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rnncore._types import Array, PyTree
from rnncore.analysis.backward import Backward, backward
from rnncore.cells.base import Cell, PointwiseCell

Loss = Callable[[Any, Array], Array]
"""(carry, outputs), as `rnncore.unroll` returns them with their batch axes, to one number."""


class GradientsOverTime(NamedTuple):
    """All that one backward pass tells.

    Fields:
      value: the loss.
      states: as `state_gradients` returns it.
      inputs: as `input_gradients` returns it.
      gates, recurrent: as `gate_gradients` returns them wrt "input" and "recurrent"; None for a cell that is
        not pointwise.
      parameters: as `per_step_parameter_gradients` returns it.
    """

    value: Array
    states: Any
    inputs: Array
    gates: Any
    recurrent: Any
    parameters: PyTree


def gradients_over_time(
    loss: Loss,
    cell: Cell,
    params: PyTree,
    xs: Array,
    initial_carry: Any = None,
    *,
    seq_lengths: Any = None,
    resets: Any = None,
    reset_carry: Any = None,
    norms: bool = False,
) -> GradientsOverTime:
    """The gradient of a loss at every step, in all that a step is made of, from one backward pass.

    Args:
      loss: (carry, outputs) to one number, of what `rnncore.unroll` returns, batch axes included.
      cell: any rnncore cell.
      params: its parameters.
      xs: inputs (*batch, T, D).
      initial_carry, seq_lengths, resets, reset_carry: as in `rnncore.unroll`.
      norms: as in `per_step_parameter_gradients`.

    Returns:
      `GradientsOverTime`.

    Raises:
      ValueError: what `unroll` refuses; a loss that is not one number; no steps; parameters, inputs or
        gradients that are not finite (outside jit).

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import analysis
      >>> cell = rnncore.GRU(4)
      >>> params = cell.init(jax.random.key(0), 3)
      >>> loss = lambda carry, outputs: jnp.sum(carry.h ** 2)
      >>> all_of_them = analysis.gradients_over_time(loss, cell, params, jnp.ones((2, 5, 3)))
      >>> all_of_them.states.h.shape, all_of_them.gates.z.shape, all_of_them.parameters.bias.shape
      ((2, 6, 4), (2, 5, 4), (5, 3, 4))

    Source: backpropagation through time, Werbos (1990).
    """
    done = backward("gradients_over_time", loss, cell, params, xs, initial_carry, seq_lengths, resets, reset_carry)
    gates, recurrent = None, None
    if isinstance(cell, PointwiseCell):
        gates, recurrent = _gates(cell, params, done)
    return GradientsOverTime(
        done.value, done.states, done.inputs, gates, recurrent, _parameters(cell, params, done, norms)
    )


def state_gradients(
    loss: Loss,
    cell: Cell,
    params: PyTree,
    xs: Array,
    initial_carry: Any = None,
    *,
    seq_lengths: Any = None,
    resets: Any = None,
    reset_carry: Any = None,
) -> Any:
    """dL/ds_t for every state, the initial one included.

    dL/ds_{t-1} = J_t^T dL/ds_t + (what L takes from s_{t-1} directly),   J_t = d s_t / d s_{t-1}

    Total over all later steps; the fields of one s_t count as independent.  So for an LSTM dL/dc_t is at a
    fixed h_t; with h_t moving along it is dL/dc_t + o_t (1 - tanh^2 c_t) dL/dh_t.  With a loss at every step
    the gradient is refreshed at every step: for retention give one loss term.

    Args:
      loss, cell, params, xs: as in `gradients_over_time`.
      initial_carry, seq_lengths, resets, reset_carry: as in `rnncore.unroll`.

    Returns:
      A carry of arrays (*batch, T + 1, ...).  Entry 0 is the state before the first step; what resets
      return to is a constant.  A reset before step t + 1 keeps entry t from all that comes later.

    Raises:
      ValueError: as `gradients_over_time` does.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import analysis
      >>> cell = rnncore.LSTM(4)
      >>> loss = lambda carry, outputs: carry.h[:, 0].sum()
      >>> states = analysis.state_gradients(loss, cell, cell.init(jax.random.key(0), 3), jnp.ones((2, 5, 3)))
      >>> states.c.shape, states.h[0, -1].tolist()
      ((2, 6, 4), [1.0, 0.0, 0.0, 0.0])
    """
    return backward("state_gradients", loss, cell, params, xs, initial_carry, seq_lengths, resets, reset_carry).states


def input_gradients(
    loss: Loss,
    cell: Cell,
    params: PyTree,
    xs: Array,
    initial_carry: Any = None,
    *,
    seq_lengths: Any = None,
    resets: Any = None,
    reset_carry: Any = None,
) -> Array:
    """dL/dx_t for every step: what in the inputs the loss depends on.

    Args:
      loss, cell, params, xs: as in `gradients_over_time`.
      initial_carry, seq_lengths, resets, reset_carry: as in `rnncore.unroll`.

    Returns:
      (*batch, T, D).

    Raises:
      ValueError: as `gradients_over_time` does.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import analysis
      >>> cell = rnncore.LSTM(4)
      >>> loss = lambda carry, outputs: outputs[:, 2].sum()
      >>> inputs = analysis.input_gradients(loss, cell, cell.init(jax.random.key(0), 3), jnp.ones((2, 5, 3)))
      >>> inputs.shape, float(jnp.abs(inputs[:, 3:]).max())
      ((2, 5, 3), 0.0)
    """
    return backward("input_gradients", loss, cell, params, xs, initial_carry, seq_lengths, resets, reset_carry).inputs


def gate_gradients(
    loss: Loss,
    cell: PointwiseCell,
    params: PyTree,
    xs: Array,
    initial_carry: Any = None,
    *,
    seq_lengths: Any = None,
    resets: Any = None,
    reset_carry: Any = None,
    wrt: str = "input",
) -> Any:
    """The gradient at the pre-activation of every gate.

    LSTM: dL/da_f = dc_t c_{t-1} f (1 - f),  dL/da_i = dc_t g i (1 - i),  dL/da_g = dc_t i (1 - g^2),
          dL/da_o = dL/dh_t tanh(c_t) o (1 - o),   dc_t = dL/dc_t + o_t (1 - tanh^2 c_t) dL/dh_t

    Args:
      loss, params, xs: as in `gradients_over_time`.
      cell: any pointwise cell.
      initial_carry, seq_lengths, resets, reset_carry: as in `rnncore.unroll`.
      wrt: "input", dL/dz_g, z = W x + b; "recurrent", dL/dr_g, r = U h_{t-1}.  They differ where r does not
        simply add to z, as for n of a GRU: there z_n has the gradient at the pre-activation, and r_n that
        times the reset gate.

    Returns:
      A named tuple by gate of arrays (*batch, T, H).

    Raises:
      ValueError: as `gradients_over_time` does; unknown wrt.
      NotImplementedError: the cell is not a `PointwiseCell`.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import analysis
      >>> cell = rnncore.LSTM(4)
      >>> loss = lambda carry, outputs: outputs.sum()
      >>> gates = analysis.gate_gradients(loss, cell, cell.init(jax.random.key(0), 3), jnp.ones((2, 5, 3)))
      >>> gates._fields, gates.f.shape
      (('i', 'f', 'g', 'o'), (2, 5, 4))
    """
    if wrt not in ("input", "recurrent"):
        raise ValueError(f"`gate_gradients(wrt={wrt!r})`: expected 'input' or 'recurrent'.")
    if isinstance(cell, Cell) and not isinstance(cell, PointwiseCell):
        raise NotImplementedError(
            f"`gate_gradients(...)`: {type(cell).__name__} is not a PointwiseCell, so it does not show what enters its "
            "gates; `state_gradients`, `input_gradients` and `per_step_parameter_gradients` take any cell."
        )
    done = backward("gate_gradients", loss, cell, params, xs, initial_carry, seq_lengths, resets, reset_carry)
    return _gates(cell, params, done)[wrt == "recurrent"]


def per_step_parameter_gradients(
    loss: Loss,
    cell: Cell,
    params: PyTree,
    xs: Array,
    initial_carry: Any = None,
    *,
    seq_lengths: Any = None,
    resets: Any = None,
    reset_carry: Any = None,
    norms: bool = False,
) -> PyTree:
    """What every step adds to the gradient of the parameters.

    dL/dtheta = sum_t contribution_t,   contribution_t = (d+ s_t / d theta)^T dL/ds_t

    d+ is the derivative of the one step, at a fixed s_{t-1}.

    Args:
      loss, cell, params, xs: as in `gradients_over_time`.
      initial_carry, seq_lengths, resets, reset_carry: as in `rnncore.unroll`; they count as constants.
      norms: return the Euclidean norm of each contribution only; then no more than one step's is
        formed at a time.

    Returns:
      The structure of params with arrays (T, ...), summed over the batch; their sum over T is `jax.grad`.
      With `norms` arrays (T,).

    Raises:
      ValueError: as `gradients_over_time` does.

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import analysis
      >>> cell = rnncore.Elman(4)
      >>> params, xs = cell.init(jax.random.key(0), 3), jnp.ones((2, 5, 3))
      >>> loss = lambda carry, outputs: outputs.sum()
      >>> steps = analysis.per_step_parameter_gradients(loss, cell, params, xs)
      >>> whole = jax.grad(lambda params: loss(*rnncore.unroll(cell, params, xs)))(params)
      >>> steps.bias.shape, bool(jnp.allclose(steps.bias.sum(0), whole.bias, atol=1e-5))
      ((5, 1, 4), True)
    """
    done = backward(
        "per_step_parameter_gradients", loss, cell, params, xs, initial_carry, seq_lengths, resets, reset_carry
    )
    return _parameters(cell, params, done, norms)


@functools.partial(jax.jit, static_argnums=0)
def _gates(cell: PointwiseCell, params: PyTree, done: Backward) -> tuple[Any, Any]:
    """(dL/dz, dL/dr), each a named tuple by gate; elementwise in dL/ds_t."""
    before = done.before
    with jax.default_matmul_precision("highest"):
        r = cell.split(cell.mix(params, before.h))
    p = jax.tree.map(lambda u: jnp.broadcast_to(u, before.h.shape), params.units)

    def new(z: Any, r: Any) -> Any:
        carry, _ = cell.pointwise(p, z, r, before)
        return jax.tree.map(lambda n, c: n.astype(c.dtype), carry, before)

    _, pull = jax.vjp(new, cell.split(done.zs), r)
    return pull(done.after)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _parameters(cell: Cell, params: PyTree, done: Backward, norms: bool) -> PyTree:
    """Every step on its own, given the gradient at the state after it."""

    def contribution(now: Any) -> PyTree:
        before, x, after = now

        def new(params: PyTree) -> Any:
            carry, _ = cell.update(params, before, cell.project(params, x))
            return jax.tree.map(lambda n, c: n.astype(c.dtype), carry, before)

        with jax.default_matmul_precision("highest"):
            _, pull = jax.vjp(new, params)
            (step,) = pull(after)
        return jax.tree.map(lambda a: jnp.linalg.norm(a.reshape(-1)), step) if norms else step

    axis = done.xs.ndim - 2
    steps = jax.tree.map(lambda a: jnp.moveaxis(a, axis, 0), (done.before, done.xs, done.after))
    return jax.lax.map(contribution, steps) if norms else jax.vmap(contribution)(steps)
