"""nnx.scan over the cell of an RNN module, configured by its arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import nnx


def scan_over(rnn: Any, step: Callable[..., Any], carry: Any, xs: Any) -> Any:
    """(carry, ys) of (cell, carry, x) -> (carry, y) over time-major xs."""
    axes = nnx.StateAxes({nnx.All(nnx.RngState, rnn.broadcast_rngs): None, **rnn.state_axes})
    scan = nnx.compat.scan(step, in_axes=(axes, nnx.Carry, 0), out_axes=(nnx.Carry, 0), unroll=rnn.unroll)
    # One split squeezed away: a broadcast stream is advanced once in every call.
    scan = nnx.split_rngs(splits=1, only=rnn.broadcast_rngs, squeeze=True)(scan)
    return scan(rnn.cell, carry, xs)
