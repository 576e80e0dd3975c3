"""An LSTM as a user would write it: what a cell that rnncore does not know costs beside the built-in one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import rnncore


class OwnLSTM(rnncore.PointwiseCell):
    """The arithmetic of `rnncore.LSTM`, its gates and its carry."""

    gates = ("i", "f", "g", "o")
    Carry = rnncore.LSTMCarry

    def pointwise(self, p: Any, z: Any, r: Any, carry: Any) -> tuple[Any, Any]:
        i, f, o = (jax.nn.sigmoid(a + b) for a, b in ((z.i, r.i), (z.f, r.f), (z.o, r.o)))
        g = jnp.tanh(z.g + r.g)
        c = f * carry.c + i * g
        return carry._replace(c=c, h=o * jnp.tanh(c)), self.Gates(i, f, g, o)
