"""nn.scan over the cell of an RNN module, configured by its fields."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.core.scope import in_filter


def scan_over(rnn: Any, step: Callable[..., Any], carry: Any, xs: Any) -> Any:
    """(carry, ys) of (cell, carry, x) -> (carry, y) over time-major xs, whose first leaf is the cell's input."""
    simple = has_plain_parameters(rnn) and set(rnn.variable_axes) <= {"intermediates"}
    if rnn.is_initializing() and rnn.variable_carry and simple:
        # nn.scan cannot create the variables that it carries; one step outside it can.
        rnn.cell(carry[0], jnp.zeros(xs[0].shape[1:], xs[0].dtype))
    scan = nn.scan(
        step,
        unroll=rnn.unroll,
        variable_axes=rnn.variable_axes,
        variable_broadcast=rnn.variable_broadcast,
        variable_carry=rnn.variable_carry,
        split_rngs=rnn.split_rngs,
    )
    return scan(rnn.cell, carry, xs)


def has_plain_parameters(rnn: Any) -> bool:
    """Whether the scan fields of an RNN module make its parameters the same at every step."""
    return (
        in_filter(rnn.variable_broadcast, "params")
        and not in_filter(rnn.variable_carry, "params")
        and not any(in_filter(name, "params") for name in rnn.variable_axes)
        and not any(split and in_filter(name, "params") for name, split in rnn.split_rngs.items())
    )
