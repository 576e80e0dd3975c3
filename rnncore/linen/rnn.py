"""RNN: a Flax cell over a sequence, through `rnncore.unroll` where the cell's equations are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from flax.core.scope import in_filter
from flax.linen import module as flax_module

from rnncore import _arguments
from rnncore import flax_modules as modules
from rnncore._types import Array
from rnncore.cells import Cell
from rnncore.linen.convert import TREES, class_of, is_rematerialized, unfit_functions
from rnncore.linen.flax_scan import has_plain_parameters, scan_over


class RNN(nn.Module):
    """Applies a cell over a sequence: flax.linen.RNN, faster, with correct lengths.

    carry_t, y_t = cell(carry_{t-1}, x_t)

    A cell of `rnncore.linen` or flax.linen with elementwise functions runs through `rnncore.unroll`, one
    under nn.remat with `recompute="gates"`, which keeps what nn.remat keeps: inputs and carries.
    Any other cell, such as a ConvLSTMCell or a subclass, runs under nn.scan as in Flax, and so does a cell whose
    parameters differ from step to step, by `variable_axes` for instance.  Where there is a remedy,
    a `rnncore.SlowPathWarning` names it, once; `rnncore.explain_backend` says which path is taken.

    Dtypes: the carry keeps the dtype it starts with, `carry_dtype` or else that of `initial_carry` or of
    `cell.initialize_carry`.  The outputs have the dtype of the cell's output for that carry, or
    `output_dtype`.  A step computes in the cell's `dtype` as in Flax; a carry of less precision rounds
    it, and through `rnncore.unroll` the outputs with it.  Flax has neither field, and fails where a step
    returns a carry of another dtype.

    Args:
      cell: the cell.
      time_major: inputs and outputs are (T, *batch, ...) and not (*batch, T, ...).
      return_carry: return (carry, outputs) and not outputs alone.
      reverse: run from the last step, with lengths the last valid one, to the first.
      keep_order: with `reverse`, outputs in the order of the inputs.
      unroll, variable_axes, variable_broadcast, variable_carry, split_rngs: for nn.scan.
      checkpoint_every, recompute, backend: as in `rnncore.unroll`; not available under nn.scan.
      carry_dtype, output_dtype: floating dtypes of the carry and the outputs; None as above.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rnncore import linen as nn
      >>> layer, xs = nn.RNN(nn.LSTMCell(4), return_carry=True), jnp.ones((2, 5, 3))
      >>> variables = layer.init(jax.random.key(0), xs)
      >>> (c, h), ys = layer.apply(variables, xs, seq_lengths=jnp.array([5, 0]))
      >>> ys.shape, h.shape, float(jnp.abs(h[1]).max())
      ((2, 5, 4), (2, 4), 0.0)

    Source: fields, tree, initial values and results of flax.linen.RNN.  Fixed: any number of batch
    axes with lengths; length 0 gives the initial carry; lengths of a wrong shape or out of range are
    an error; NaN and inf in the padding count as 0; `init` makes the collections of `variable_carry`.
    """

    cell: nn.RNNCellBase
    time_major: bool = False
    return_carry: bool = False
    reverse: bool = False
    keep_order: bool = False
    unroll: int = 1
    variable_axes: Mapping[Any, Any] = FrozenDict()
    variable_broadcast: Any = "params"
    variable_carry: Any = False
    split_rngs: Mapping[Any, bool] = FrozenDict({"params": False})
    checkpoint_every: int | None = field(default=None, kw_only=True)
    recompute: str = field(default="nothing", kw_only=True)
    backend: str | None = field(default=None, kw_only=True)
    carry_dtype: Any = field(default=None, kw_only=True)
    output_dtype: Any = field(default=None, kw_only=True)

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        _arguments.refuse_foreign(cls, kwargs)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        modules.check_is_cell(self.cell, "linen", "LSTMCell(256)")
        super().__post_init__()

    @_arguments.takes_inputs
    def __call__(
        self,
        inputs: Array,
        *,
        initial_carry: Any = None,
        init_key: Array | None = None,
        seq_lengths: Any = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
        resets: Any = None,
        reset_carry: Any = None,
        return_states: bool = False,
    ) -> Any:
        """Runs the cell over the inputs; None takes the field of that name.

        Args:
          inputs: (*batch, T, D), or (T, *batch, D) with `time_major`; any number of batch axes.  A
            cell with several feature axes has them in place of D.
          initial_carry: the carry before the first step, as `cell.initialize_carry` makes it, which
            is called where there is none.
          init_key: key for that; `jax.random.key(0)` by default, so a random carry is the same in
            every call.
          seq_lengths: integers (*batch).  The carry returned is the one after the last valid step;
            outputs past it go on from the padding.
          resets: booleans of the inputs' shape without features.  Where True the carry returns to
            `reset_carry` before that step.
          reset_carry: what resets return to, of the structure of `initial_carry`, which it is by
            default.  Give `cell.initialize_carry(...)` where the initial carry is a stored one.
          return_states: return `rnncore.States` as the last element: every carry, in the structure
            of the cell's, and every gate (None under nn.scan, where a cell shows none).

        Returns:
          outputs, (carry, outputs), (outputs, states) or (carry, outputs, states).

        Raises:
          ValueError: invalid shapes, lengths or options.
          NotImplementedError: an option that this cell cannot take; the message says why.
        """
        modules.check_dtypes(self)
        call = modules.call_of(
            self, inputs, initializer(self.cell, init_key), initial_carry=initial_carry, seq_lengths=seq_lengths,
            resets=resets, reset_carry=reset_carry, return_states=return_states, return_carry=return_carry,
            time_major=time_major, reverse=reverse, keep_order=keep_order,
        )  # fmt: skip
        slow = self._slow_path(inputs, call.carry)
        if slow is not None:
            return modules.scan_cell(self, call, "nn.scan", slow, scan_over)
        core, params = self._functional(call)
        # A step under nn.remat keeps its carry, and recomputes projections and gates.
        rematerialized = is_rematerialized(self.cell) and self.recompute == "nothing"
        return modules.unroll(self, call, core, params, recompute="gates" if rematerialized else None)

    @nn.nowrap
    def _functional(self, call: modules.Call) -> tuple[Cell, Any]:
        """The cell and its parameters as `rnncore.unroll` takes them."""
        cell: Any = self.cell
        tree = TREES[class_of(cell)]
        if not tree.is_complete(cell, cell.variables.get("params", {})):
            # One step creates the parameters; where that is not allowed, it raises Flax's own error.
            cell(call.carry, jnp.zeros(call.step_shape, call.inputs.dtype))
        weights = nn.meta.unbox(cell.variables["params"])
        return tree.assemble(cell, weights, call.inputs, jax.tree.leaves(call.carry)[-1])

    @nn.nowrap
    def _slow_path(self, inputs: Array, carry: Any) -> modules.SlowPath | None:
        """Why the cell has to run under nn.scan, or None."""
        cell = self.cell
        if class_of(cell) not in TREES:
            return modules.unknown_cell(cell, TREES, "linen")
        if found := modules.complex_numbers(cell, inputs, carry):
            return found
        if not has_plain_parameters(self):
            return modules.SlowPath("its parameters are not simply the same at every step")
        if getattr(flax_module, "_global_interceptor_stack", ()):
            reason = "an interceptor (nn.intercept_methods) must see its calls"
            return modules.SlowPath(reason, "call the model outside of nn.intercept_methods")
        kept = (self.variable_broadcast, self.variable_carry, *self.variable_axes)
        if any(flax_module._context.capture_stack[-1:]) and any(in_filter(name, "intermediates") for name in kept):
            reason = "`capture_intermediates` needs its result at every step"
            remedy = "leave 'intermediates' out of the RNN's scan fields; return_states=True gives every carry"
            return modules.SlowPath(reason, remedy)
        return unfit_functions(cell, carry)


def initializer(cell: Any, key: Array | None) -> Callable[[tuple[int, ...]], Any]:
    """What makes the carry of a cell for inputs of a step's shape."""
    return lambda shape: cell.initialize_carry(jax.random.key(0) if key is None else key, shape)
