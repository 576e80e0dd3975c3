"""Gradients over time, at the states, inputs, gates and parameters of every step, from one backward pass."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from rnncore._types import Array, PyTree
from rnncore.analysis.gradients._backward import Backward, Loss, backward, through_gates
from rnncore.cells.base import Cell, PointwiseCell

_through_gates = jax.jit(through_gates, static_argnums=0)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("params", "_pass"), meta_fields=("cell", "norms"))
@dataclasses.dataclass(frozen=True, repr=False)
class GradientsOverTime:
    """The gradient of a loss at every step; a pytree.  `gates` and `parameters` are computed on access.

    Fields:
      cell, params: the cell that ran and its parameters.
      norms: whether `parameters` are norms only.
    """

    cell: Cell
    params: PyTree
    norms: bool
    _pass: Backward

    def __repr__(self) -> str:
        return f"GradientsOverTime({type(self.cell).__name__}, loss {self.value}, inputs {self.inputs.shape})"

    @property
    def value(self) -> Array:
        """The loss."""
        return self._pass.value

    @property
    def states(self) -> Any:
        """dL/ds_t at every state, a carry of arrays (*batch, T + 1, ...), the initial one first.

        dL/ds_{t-1} = J_t^T dL/ds_t + (the part of L that depends on s_{t-1} directly),   J_t = d s_t / d s_{t-1}

        Total over all later steps; the fields of one s_t count as independent.  So for an LSTM dL/dc_t is at a
        fixed h_t; with h_t moving along it is dL/dc_t + o_t (1 - tanh^2 c_t) dL/dh_t.  A loss at every step adds to
        the gradient at every step: for retention use a single loss term.  Entry 0 is the state before the first step.
        The reset carry is a constant, and a reset before step t + 1 cuts entry t off from everything later.
        """
        return self._pass.states

    @property
    def inputs(self) -> Array:
        """dL/dx_t at every input, (*batch, T, D)."""
        return self._pass.inputs

    @property
    def gates(self) -> Any:
        """dL/dz_g at the pre-activation of every gate, z = W x + b; a named tuple by gate of arrays (*batch, T, H).

        LSTM: dL/da_f = dc_t c_{t-1} f (1 - f),  dL/da_i = dc_t g i (1 - i),  dL/da_g = dc_t i (1 - g^2),
              dL/da_o = dL/dh_t tanh(c_t) o (1 - o),   dc_t = dL/dc_t + o_t (1 - tanh^2 c_t) dL/dh_t

        NotImplementedError for a cell that is not a `PointwiseCell`.
        """
        return self._by_gate[0]

    @property
    def recurrent(self) -> Any:
        """dL/dr_g, r = U h_{t-1}, as `gates`.

        The two differ where r is not simply added to z, as for n of a GRU: dL/dz_n is the gradient at the
        pre-activation, dL/dr_n the same times the reset gate.
        """
        return self._by_gate[1]

    @property
    def parameters(self) -> PyTree:
        """The contribution of every step to the gradient of the parameters, arrays (T, ...) summed over the batch.

        dL/dtheta = sum_t contribution_t,   contribution_t = (d+ s_t / d theta)^T dL/ds_t

        d+ is the derivative of a single step, at a fixed s_{t-1}.  The sum over T is `jax.grad`.  With `norms`
        the Euclidean norm of each, (T,), with no more than one step in memory at a time.
        """
        return _parameters(self.cell, self.params, self._pass, self.norms)

    @property
    def _by_gate(self) -> tuple[Any, Any]:
        if not isinstance(self.cell, PointwiseCell):
            raise NotImplementedError(
                f"`gradients_over_time(...).gates`: {type(self.cell).__name__} is not a PointwiseCell, so what enters "
                "its gates is not known; use `.states`, `.inputs` or `.parameters`, which any cell has."
            )
        return _through_gates(self.cell, self.params, self._pass)[:2]


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
    """The gradient of a loss at the states, inputs, gates and parameters of every step, from one backward pass.

    Args:
      loss: (carry, outputs), as `rnncore.unroll` returns them, batch axes included, to one number.
      cell: any rnncore cell.
      params: its parameters.
      xs: inputs (*batch, T, D).
      initial_carry, seq_lengths, resets, reset_carry: as in `rnncore.unroll`; held constant for `parameters`.
      norms: whether `parameters` holds only the norms of the contributions.

    Returns:
      `GradientsOverTime`.

    Raises:
      ValueError: what `unroll` refuses; a loss that is not one number; no steps; parameters, inputs or
        gradients that are not finite (outside jit).

    Example:
      >>> import jax, jax.numpy as jnp, rnncore
      >>> from rnncore import analysis
      >>> cell = rnncore.GRU(4)
      >>> params, xs = cell.init(jax.random.key(0), 3), jnp.ones((2, 5, 3))
      >>> loss = lambda carry, outputs: jnp.sum(carry.h ** 2)
      >>> found = analysis.gradients_over_time(loss, cell, params, xs)
      >>> found.states.h.shape, found.inputs.shape, found.gates.z.shape, found.parameters.bias.shape
      ((2, 6, 4), (2, 5, 3), (2, 5, 4), (5, 3, 4))
      >>> whole = jax.grad(lambda params: loss(*rnncore.unroll(cell, params, xs)))(params)
      >>> bool(jnp.allclose(found.parameters.bias.sum(0), whole.bias, atol=1e-5))
      True

    Source: backpropagation through time, Werbos (1990).
    """
    options = (initial_carry, seq_lengths, resets, reset_carry)
    done = backward("gradients_over_time", loss, cell, params, xs, *options)
    return GradientsOverTime(cell, params, norms, done)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _parameters(cell: Cell, params: PyTree, done: Backward, norms: bool) -> PyTree:
    """Each step by itself, given the gradient at the state after it."""

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
