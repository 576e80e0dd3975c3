"""Minimal gated unit."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from rnncore import initializers
from rnncore._types import Activation, Initializer
from rnncore.cells.base import PointwiseCell


@dataclasses.dataclass(frozen=True)
class MGU(PointwiseCell):
    """Minimal gated unit in the form of flax.linen.MGUCell.

    f_t = sigmoid(W_f x_t + U_f h_{t-1} + b_f)
    n_t = tanh(W_n x_t + b_n + f_t (U_n h_{t-1} + b_hn))     (reset_gate=False: f_t and b_hn left out)
    h_t = (1 - f_t) n_t + f_t h_{t-1}

    Args:
      hidden_size: H.
      reset_gate: whether f_t also gates the recurrent part of the candidate.
      gate_fn, activation_fn: in place of sigmoid and tanh.
      recurrence, kernel_init, recurrent_init: as in `PointwiseCell`.
      bias_init: initialiser of the (2, H) bias; 1 on f by default, as in Flax.

    Example:
      >>> import jax, rnncore
      >>> rnncore.MGU(4).init(jax.random.key(0), 3).bias[0].tolist()
      [1.0, 1.0, 1.0, 1.0]

    Source: Zhou, Wu, Zhang and Zhou (2016), arXiv:1603.09420, which resets before the product and
    swaps f and 1 - f in the last line.
    """

    bias_init: Initializer = dataclasses.field(default=initializers.forget_bias(1.0, gates=("f", "n")), kw_only=True)
    reset_gate: bool = dataclasses.field(default=True, kw_only=True)
    gate_fn: Activation = dataclasses.field(default=jax.nn.sigmoid, kw_only=True)
    activation_fn: Activation = dataclasses.field(default=jnp.tanh, kw_only=True)

    gates = ("f", "n")

    @property
    def recurrent_bias(self) -> tuple[str, ...]:
        return ("n",) if self.reset_gate else ()

    def pointwise(self, p: Any, z: Any, r: Any, carry: Any) -> tuple[Any, Any]:
        del p
        f = self.gate_fn(z.f + r.f)
        n = self.activation_fn(z.n + (f * r.n if self.reset_gate else r.n))
        return self.Carry((1 - f) * n + f * carry.h), self.Gates(f, n)
