"""Bidirectional: one RNN forward, one backward, outputs merged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import nnx

from rnncore import _arguments
from rnncore import flax_modules as modules
from rnncore._types import Array
from rnncore.nnx import initial
from rnncore.nnx.rnn import RNN


class Bidirectional(nnx.Bidirectional):
    """Reads a sequence in both directions: flax.nnx.Bidirectional.

    y_t = merge_fn(forward_rnn(x)_t, backward_rnn(x)_t), both in the order of the inputs

    The layout of time is that of this module: its `time_major`, or that of the call, goes to both
    children.  A child with `time_major=True` in a layer without it would read the batch as time, and
    is an error.  A child's own `reverse` and `keep_order` are ignored.

    Args:
      forward_rnn, backward_rnn: an `RNN` each, of rnncore, of Flax, or anything with its call.  Give
        each its own random numbers, or one `nnx.Rngs` in turn: built from `nnx.Rngs(0)` each, as in
        the example of Flax, both directions start from the same parameters.
      merge_fn: (forward outputs, backward outputs) to outputs; joins the features by default.
      time_major: inputs and outputs are (T, *batch, ...) and not (*batch, T, ...).
      return_carry: return ((forward carry, backward carry), outputs) and not outputs alone.
      rngs: for random initial carries of the children, as in `RNN`: True keeps a stream where a child
        needs one and no state elsewhere.  An `nnx.RngStream` is kept as it is.

    Example:
      >>> import jax.numpy as jnp
      >>> from rnncore import nnx
      >>> rngs = nnx.Rngs(0)
      >>> layer = nnx.Bidirectional(*(nnx.RNN(nnx.GRUCell(3, 4, rngs=rngs)) for _ in range(2)))
      >>> layer(jnp.ones((2, 5, 3))).shape
      (2, 5, 8)

    Source: Schuster and Paliwal (1997); arguments, tree and results of flax.nnx.Bidirectional, which
    always holds rng state and silently overrides a child's `time_major`.
    """

    def __init__(
        self,
        forward_rnn: Any,
        backward_rnn: Any,
        *,
        merge_fn: Callable[[Array, Array], Array] = modules.concatenate,
        time_major: bool = False,
        return_carry: bool = False,
        rngs: nnx.Rngs | nnx.RngStream | bool = True,
    ):
        self.forward_rnn = forward_rnn
        self.backward_rnn = backward_rnn
        self.merge_fn = merge_fn
        modules.check_are_rnns(self)
        self.time_major = time_major
        self.return_carry = return_carry
        random = any(_is_random(rnn) for rnn in (forward_rnn, backward_rnn))
        if isinstance(rngs, nnx.RngStream):
            self.rngs = rngs  # shared with its owner, as in Flax
        else:
            self.rngs = initial.carry_stream(rngs, random, "Bidirectional")

    @_arguments.takes_inputs
    def __call__(
        self,
        inputs: Array,
        *,
        initial_carry: Any = None,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        seq_lengths: Any = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
    ) -> Any:
        """Runs both directions; None takes the argument of the constructor.

        Args:
          inputs: (*batch, T, D), or (T, *batch, D) with `time_major`.
          initial_carry: (forward carry, backward carry).
          rngs: for random initial carries, forward first.
          seq_lengths: integers (*batch); the backward direction starts at the last valid step.
          return_carry, time_major: in place of the constructor's.
          reverse: False or None; to read backwards swap the children.
          keep_order: outputs are always in the order of the inputs, so it has no effect.

        Returns:
          outputs, or ((forward carry, backward carry), outputs).

        Raises:
          ValueError: a child with `time_major=True` in a layer without.
          NotImplementedError: `reverse=True`.
        """
        del keep_order
        rngs = self.rngs if rngs is None else rngs
        rngs = rngs.carry if isinstance(rngs, nnx.Rngs) else rngs
        return modules.both_directions(
            self, inputs, [{"rngs": rngs}] * 2, initial_carry=initial_carry, seq_lengths=seq_lengths,
            return_carry=return_carry, time_major=time_major, reverse=reverse,
        )  # fmt: skip


def _is_random(rnn: Any) -> bool:
    """Whether a child may ask this layer for random numbers."""
    if isinstance(rnn, nnx.RNN) and not initial.is_random(rnn.cell):
        # Flax's own RNN requires a key even for zeros, and keeps one by default.
        return rnn.rngs is None and not isinstance(rnn, RNN)
    return True
