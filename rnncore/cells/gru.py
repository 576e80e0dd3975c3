"""Gated recurrent unit with the reset after the product."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from rnncore._types import Activation
from rnncore.cells.base import PointwiseCell


@dataclasses.dataclass(frozen=True)
class GRU(PointwiseCell):
    """Gated recurrent unit, reset after the product: the form of cuDNN, PyTorch and Flax.

    r_t = sigmoid(W_r x_t + U_r h_{t-1} + b_r)
    z_t = sigmoid(W_z x_t + U_z h_{t-1} + b_z)
    n_t = tanh(W_n x_t + b_n + r_t (U_n h_{t-1} + b_hn))
    h_t = (1 - z_t) n_t + z_t h_{t-1}

    Args:
      hidden_size: H.
      forget_bias: added to b_z once, at initialisation: z is the gate that keeps the old state.
      gate_fn, activation_fn: in place of sigmoid and tanh.
      recurrence, kernel_init, recurrent_init, bias_init: as in `PointwiseCell`.

    Example:
      >>> import jax, rnncore
      >>> rnncore.GRU(4).init(jax.random.key(0), 3).recurrent_bias.shape
      (1, 4)

    Source: Cho et al. (2014), arXiv:1406.1078v3.  torch.nn.GRU has two biases on r and z that add
    up; flax.nnx.GRUCell lacks b_hn; Haiku resets before the product (`ResetBeforeGRU`) and swaps
    the roles of z and 1 - z.
    """

    forget_bias: float = dataclasses.field(default=0.0, kw_only=True)
    gate_fn: Activation = dataclasses.field(default=jax.nn.sigmoid, kw_only=True)
    activation_fn: Activation = dataclasses.field(default=jnp.tanh, kw_only=True)

    gates = ("r", "z", "n")

    recurrent_bias = ("n",)
    forgets = "z"

    def pointwise(self, p: Any, z: Any, r: Any, carry: Any) -> tuple[Any, Any]:
        del p
        reset = self.gate_fn(z.r + r.r)
        keep = self.gate_fn(z.z + r.z)
        n = self.activation_fn(z.n + reset * r.n)
        return self.Carry((1 - keep) * n + keep * carry.h), self.Gates(reset, keep, n)
