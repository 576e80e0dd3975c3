"""RNN: an nnx cell over a sequence, through `rnncore.unroll` where its equations are known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from rnncore import _arguments
from rnncore import flax_modules as modules
from rnncore._types import Array
from rnncore.nnx import initial, trees
from rnncore.nnx.flax_scan import scan_over

_AXES: Any = {...: nnx.Carry}
"""All state is carried from step to step: Flax's default."""


class RNN(nnx.RNN):
    """Applies a cell over a sequence: flax.nnx.RNN, faster, with correct lengths.

    carry_t, y_t = cell(carry_{t-1}, x_t)

    A cell of `rnncore.nnx` or flax.nnx with elementwise functions runs through `rnncore.unroll`.
    Any other cell, such as a subclass or a cell with a replaced layer, runs under nnx.scan as
    in Flax, and so does a cell whose state differs from step to step by `state_axes`.  There, as in
    Flax, `jax.jit` or `jax.vmap` of a function that closes over the module is an error; use `nnx.jit`, or merge
    the module inside.

    Dtypes: the carry keeps the dtype it starts with, `carry_dtype` or else that of `initial_carry` or of
    `cell.initialize_carry`.  The outputs have the dtype of the cell's output for that carry, or
    `output_dtype`.  A step computes in the cell's `dtype` as in Flax; a carry of less precision rounds
    it, and through `rnncore.unroll` the outputs with it.

    Args:
      cell: the cell.
      time_major: inputs and outputs are (T, *batch, ...) and not (*batch, T, ...).
      return_carry: return (carry, outputs) and not outputs alone.
      reverse: run from the last step, with lengths the last valid one, to the first.
      keep_order: with `reverse`, outputs in the order of the inputs.
      unroll, state_axes, broadcast_rngs: for nnx.scan.
      rngs: for a random initial carry.  True keeps a stream where the cell's carry is random (its
        `carry_init` is neither zeros nor ones) or made by a method that is not known, and no state at
        all elsewhere.  False keeps none; `nnx.Rngs` and `nnx.RngStream` are forked and kept.
      checkpoint_every, recompute, backend: as in `rnncore.unroll`; not available under nnx.scan.
      carry_dtype, output_dtype: floating dtypes of the carry and the outputs; None as above.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rnncore import nnx
      >>> layer, xs = nnx.RNN(nnx.LSTMCell(3, 4, rngs=nnx.Rngs(0)), return_carry=True), jnp.ones((2, 5, 3))
      >>> (c, h), ys = jax.jit(layer)(xs, seq_lengths=jnp.array([5, 0]))
      >>> ys.shape, h.shape, float(jnp.abs(h[1]).max())
      ((2, 5, 4), (2, 4), 0.0)
      >>> graph, params = nnx.split(layer, nnx.Param)  # there are only parameters

    Source: arguments, state tree and results of flax.nnx.RNN.  Fixed: no rng state where nothing is
    random (Flax's makes `nnx.split(rnn, nnx.Param)`, `jax.jit` and `jax.vmap` fail); any number of
    batch axes with lengths; length 0 gives the initial carry; lengths of a wrong shape or out of range
    are an error; NaN and inf in the padding count as 0; a step whose carry comes out in another dtype
    than it went in with (Flax fails) keeps the initial carry's dtype.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        _arguments.refuse_foreign(cls, kwargs)
        return super().__new__(cls)

    def __init__(
        self,
        cell: Any,
        *,
        time_major: bool = False,
        return_carry: bool = False,
        reverse: bool = False,
        keep_order: bool = False,
        unroll: int = 1,
        state_axes: Mapping[Any, Any] | None = None,
        broadcast_rngs: Any = None,
        rngs: nnx.Rngs | nnx.RngStream | bool = True,
        checkpoint_every: int | None = None,
        recompute: str = "nothing",
        backend: str | None = None,
        carry_dtype: Any = None,
        output_dtype: Any = None,
    ):
        modules.check_is_cell(cell, "nnx", "LSTMCell(3, 256, rngs=rngs)")
        self.cell = cell
        self.time_major = time_major
        self.return_carry = return_carry
        self.reverse = reverse
        self.keep_order = keep_order
        self.unroll = unroll
        self.state_axes = state_axes or nnx.StateAxes(_AXES)  # type: ignore[assignment]
        self.broadcast_rngs = broadcast_rngs
        self.rngs = initial.carry_stream(rngs, initial.is_random(cell), "RNN")
        self.checkpoint_every = checkpoint_every
        self.recompute = recompute
        self.backend = backend
        self.carry_dtype = carry_dtype
        self.output_dtype = output_dtype
        modules.check_dtypes(self)

    @_arguments.takes_inputs
    def __call__(
        self,
        inputs: Array,
        *,
        initial_carry: Any = None,
        seq_lengths: Any = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        resets: Any = None,
        reset_carry: Any = None,
        return_states: bool = False,
    ) -> Any:
        """Runs the cell over the inputs; None takes the argument of the constructor.

        Args:
          inputs: (*batch, T, D), or (T, *batch, D) with `time_major`; any number of batch axes.  A
            cell with several feature axes has them in place of D.
          initial_carry: the carry before the first step, as `cell.initialize_carry` makes it, which
            is called where there is none.
          seq_lengths: integers (*batch).  The carry returned is the one after the last valid step;
            outputs past it go on from the padding.
          rngs: for a random initial carry, in place of the layer's own stream.
          resets: booleans of the inputs' shape without features.  Where True the carry returns to
            `reset_carry` before that step.
          reset_carry: what resets return to, of the structure of `initial_carry`, which it is by
            default.  Give `cell.initialize_carry(...)` where the initial carry is a stored one.
          return_states: return `rnncore.States` as the last element: every carry, in the structure
            of the cell's, and every gate (None under nnx.scan, where a cell shows none).

        Returns:
          outputs, (carry, outputs), (outputs, states) or (carry, outputs, states).

        Raises:
          ValueError: invalid shapes, lengths or options; a random carry without rngs.
          NotImplementedError: an option that this cell cannot take; the message says why.
        """
        call = modules.call_of(
            self, inputs, lambda shape: initial.carry(self.cell, shape, self.rngs if rngs is None else rngs),
            initial_carry=initial_carry, seq_lengths=seq_lengths, resets=resets, reset_carry=reset_carry,
            return_states=return_states, return_carry=return_carry, time_major=time_major, reverse=reverse,
            keep_order=keep_order,
        )  # fmt: skip
        slow = self._slow_path(inputs, call.carry)
        if slow is not None:
            return modules.scan_cell(self, call, "nnx.scan", slow, scan_over)
        core, params = trees.assemble(self.cell, inputs, jax.tree.leaves(call.carry)[-1])
        return modules.unroll(self, call, core, params)

    def _slow_path(self, inputs: Array, carry: Any) -> modules.SlowPath | None:
        """Why the cell has to run under nnx.scan, or None."""
        if self.state_axes != nnx.StateAxes(_AXES) or self.broadcast_rngs is not None:
            return modules.SlowPath("state_axes or broadcast_rngs say how its state goes through the steps")
        return trees.slow_path(self.cell) or modules.complex_numbers(self.cell, inputs, carry)
