"""Bidirectional: one RNN forward, one backward, outputs merged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from rnncore import _arguments
from rnncore import flax_modules as modules
from rnncore._types import Array


class Bidirectional(nn.Module):
    """Reads a sequence in both directions: flax.linen.Bidirectional.

    y_t = merge_fn(forward_rnn(x)_t, backward_rnn(x)_t), both in the order of the inputs

    The layout of time is that of this module: its `time_major`, or that of the call, goes to both
    children.  A child with `time_major=True` in a layer without it would read the batch as time, and
    is an error.  A child's own `reverse` and `keep_order` are ignored.

    Args:
      forward_rnn, backward_rnn: an `RNN` each, of rnncore, of Flax, or anything with its call.
      merge_fn: (forward outputs, backward outputs) to outputs; joins the features by default.
      time_major: inputs and outputs are (T, *batch, ...) and not (*batch, T, ...).
      return_carry: return ((forward carry, backward carry), outputs) and not outputs alone.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from rnncore import linen as nn
      >>> layer = nn.Bidirectional(nn.RNN(nn.GRUCell(4)), nn.RNN(nn.GRUCell(4)))
      >>> layer.init_with_output(jax.random.key(0), jnp.ones((2, 5, 3)))[0].shape
      (2, 5, 8)

    Source: Schuster and Paliwal (1997); fields, tree and results of flax.linen.Bidirectional, which
    silently overrides a child's `time_major` and ignores `reverse` and `keep_order`.
    """

    forward_rnn: Any
    backward_rnn: Any
    merge_fn: Callable[[Array, Array], Array] = modules.concatenate
    time_major: bool = False
    return_carry: bool = False

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
    ) -> Any:
        """Runs both directions; None takes the field of that name.

        Args:
          inputs: (*batch, T, D), or (T, *batch, D) with `time_major`.
          initial_carry: (forward carry, backward carry).
          init_key: key for the initial carries, split in two: forward, then backward.
          seq_lengths: integers (*batch); the backward direction starts at the last valid step.
          return_carry, time_major: in place of the fields.
          reverse: False or None; to read backwards swap the children.
          keep_order: outputs are always in the order of the inputs, so it has no effect.

        Returns:
          outputs, or ((forward carry, backward carry), outputs).

        Raises:
          ValueError: a child with `time_major=True` in a layer without.
          NotImplementedError: `reverse=True`.
        """
        del keep_order
        modules.check_are_rnns(self)
        keys = (None, None) if init_key is None else jax.random.split(init_key)
        return modules.both_directions(
            self, inputs, [{"init_key": key} for key in keys], initial_carry=initial_carry, seq_lengths=seq_lengths,
            return_carry=return_carry, time_major=time_major, reverse=reverse,
        )  # fmt: skip
